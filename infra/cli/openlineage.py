"""`foldflow openlineage`: tells the ledger as OpenLineage events."""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

from infra.cli.terminal import fail, quiet, say
from streams.settings import Settings

if TYPE_CHECKING:
    from infra.openlineage.ledger import Ledger
    from infra.openlineage.receivers import Receiver

REFUSED, WRONG, UNREACHABLE = 1, 2, 4
API_KEY: Final = "OPENLINEAGE_API_KEY"
"""The environment variable of a receiver's key: that of OpenLineage's own clients."""


def openlineage(
    to: Annotated[
        str, typer.Option("--to", metavar="URL", help="A receiver: events go to its /api/v1/lineage.", show_default=False)
    ] = "",
    topic: Annotated[
        str,
        typer.Option("--topic", help="A topic of the configured Kafka, by its whole name; it must be there.", show_default=False),
    ] = "",
    run: Annotated[
        str, typer.Option("--run", metavar="RUN", help="Only this run: its id, the beginning of it, or its request's.")
    ] = "",
    since: Annotated[
        str, typer.Option("--since", help="Only what was decided since: 7d (ago), 2026-11-21, or a time.", show_default=False)
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as runs go on, until it is stopped; once more: go on from there.")
    ] = False,
    namespace: Annotated[
        str, typer.Option("--namespace", help="Namespace of jobs and datasets; else FOLDFLOW_TOPIC_PREFIX without its end.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Say at the end what was sent as one JSON object.")] = False,
) -> None:
    """Tell runs as OpenLineage events: to a receiver (Marquez, DataHub, OpenMetadata …), a Kafka topic, or standard output.

    A run is a run of the job WORKFLOW, each attempt of a step one of WORKFLOW.STEP; outputs, files and addresses are datasets,
    and which goes into which is what `foldflow lineage` shows. What was asked and answered isn't told. docs/openlineage.md has
    it all.

    Without --follow all that is there is told, and that is it. With it, and a receiver or topic, how far it came is kept in a
    consumer group: started again, after a kill too, it goes on there (--since is then for the first start only). Every event
    arrives at least once; one that comes again is the same to the byte. A receiver that is away is waited for. Its key is read
    from OPENLINEAGE_API_KEY.

    For example:

        foldflow openlineage --to http://127.0.0.1:5000 --follow

        foldflow openlineage --to https://datahub.example/openapi/openlineage --since 7d

        foldflow openlineage --topic openlineage.events --follow

        foldflow openlineage --run 8f6a3a7e | jq '{eventType, job: .job.name, inputs: [.inputs[].name]}'

    Exit codes: 0 told, or stopped while following, 1 the receiver refuses an event (which one is said; nothing is skipped), or
    it was stopped before its end, 2 a wrong option, or no such run or topic, 4 Kafka can't be reached, or has no ledger yet.
    """
    if to and topic:
        fail("Say one of --to and --topic; start it twice for both.", WRONG)
    if run and (since or follow):
        fail("--run tells one run as far as it is: leave --since and --follow out.", WRONG)
    if find_spec("openlineage") is None:  # an extra
        fail("OpenLineage's library isn't installed: pip install 'foldflow[openlineage]'.", WRONG)
    import structlog  # noqa: PLC0415 - Kafka and Avro are not needed for mistakes in the options

    from infra.openlineage.receivers import RefusedError, StoppedError  # noqa: PLC0415
    from streams import kafka  # noqa: PLC0415

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # standard output is the events'
    settings, stop = quiet(Settings()), threading.Event()
    since_ms = _time(since) if since else None
    receiver = _receiver(settings, to, topic, stop)
    space = namespace or settings.topic_prefix.rstrip("._-") or "foldflow"
    silent = as_json or not (to or topic)
    try:
        sent = _told(settings, receiver, space, run, since_ms, stop, follow=follow, silent=silent)
    except RefusedError as error:
        fail(f"{error}\nNothing was skipped. Put right what it minds, and start again.", REFUSED)
    except (kafka.KafkaUnreachableError, kafka.TopicsMissingError, kafka.DeliveryFailedError) as error:
        fail(str(error), UNREACHABLE)
    except StoppedError:
        fail(f"Stopped before {receiver.name} had everything: start again.", 0 if follow else REFUSED)
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered must not complain when the process ends.
        sys.stdout = None
        raise typer.Exit(0) from None
    if as_json and (to or topic):
        print(json.dumps({"to": receiver.name, "namespace": space, "events": sent}))
    elif to or topic:
        print(f"{sent:,} events sent to {receiver.name}")


def _receiver(settings: Settings, to: str, topic: str, stop: threading.Event) -> "Receiver":
    """Return where events go; ends the command if it isn't there."""
    from infra.openlineage.receivers import Http, KafkaTopic, Lines  # noqa: PLC0415 - Kafka and Avro
    from streams import kafka  # noqa: PLC0415

    try:
        if to:
            return Http(to, os.environ.get(API_KEY), say, stop)
        return KafkaTopic(settings, topic) if topic else Lines()
    except ValueError as error:
        return fail(f"--to: {error}", WRONG)
    except kafka.TopicsMissingError:
        return fail(f"There is no topic {topic}. Make it: foldflow kafka topics --create --topic {topic} --partitions 8", WRONG)
    except kafka.KafkaUnreachableError as error:
        return fail(str(error), UNREACHABLE)


def _told(
    settings: Settings,
    receiver: "Receiver",
    space: str,
    run: str,
    since: int | None,
    stop: threading.Event,
    *,
    follow: bool,
    silent: bool,
) -> int:
    """Tell what is asked for, and return how many events that were."""
    from infra.openlineage.ledger import Ledger  # noqa: PLC0415 - Kafka, Avro, DuckDB
    from infra.openlineage.receivers import Lines  # noqa: PLC0415

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopping(stop))
    if run:
        for run_id in _ids(settings, run):
            with Ledger(settings, space, run=run_id) as ledger:
                if sent := _all(ledger, receiver, stop, silent=silent):
                    return sent
        fail(f"There is no run `{run}`. `foldflow runs` lists them.", WRONG)
    group = None if isinstance(receiver, Lines) or not follow else group_of(receiver, space)
    with Ledger(settings, space, group=group, since=since) as ledger:
        if not follow:
            return _all(ledger, receiver, stop, silent=silent)
        if group is not None:
            say(f"Telling {receiver.name}; how far is kept in the consumer group {settings.topic_prefix}{group}.")
        sent = 0
        for events in ledger.coming(stop):
            receiver.send(events)
            sent += len(events)
            ledger.commit()
        ledger.commit(now=True)
        return sent


def _all(ledger: "Ledger", receiver: "Receiver", stop: threading.Event, *, silent: bool) -> int:
    """Tell what is there now, and return how many events that were."""
    from infra.cli.verify import progress  # noqa: PLC0415 - only here

    ends, sent = ledger.ends(), 0
    with progress("telling", ledger.behind(ends), silent=silent) as tick:
        for events, read in ledger.stored(ends):
            receiver.send(events)
            sent += len(events)
            tick(read)
            if stop.is_set():
                fail(f"Stopped: {sent:,} events are sent to {receiver.name}. Started again, it begins anew.", REFUSED)
    return sent


def group_of(receiver: "Receiver", space: str) -> str:
    """Return the name of the consumer group that keeps how far a receiver was told, without the prefix."""
    return f"openlineage.{hashlib.blake2b(f'{receiver.name} {space}'.encode(), digest_size=4).hexdigest()}"


def _ids(settings: Settings, run: str) -> Iterator[str]:
    """Yield the runs that a person may mean."""
    from infra.cli.replay import ids_of  # noqa: PLC0415 - Kafka and Avro
    from projections.replay_sources import KafkaLog  # noqa: PLC0415

    return ids_of(KafkaLog.open(settings), run)


def _stopping(stop: threading.Event) -> Callable[[int, FrameType | None], None]:
    """Return what stops in order at the first signal, and at once at the second."""

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    return handle


def _time(text: str) -> int | None:
    """Return what a time says, milliseconds since the epoch; ends the command if it is none."""
    from api.times import ms_of, point  # noqa: PLC0415 - FastAPI

    try:
        return ms_of(point(text))
    except ValueError as error:
        return fail(f"--since: {error}", WRONG)
