"""Every poison, judged by the product's own classes without a broker: none raises, and what follows always fits a record.

It is quick and names the line; that real processes live through it is shown in test_poison.py.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from poison import HONEST, NO_RUN, RECORD_LIMIT, SIGNAL, WAITING, Poison, Scene, Shot
from poisons import POISONS

from events import codec, ids, topics
from events.commands import StartRun, WorkflowRegistered
from events.decisions import FinishedRuns
from events.errors import NotDecodableError
from events.results import InboxMessage
from infra.cli import deadletters, workers
from infra.cli.letters import Entry, take
from projections.ledger import Record
from projections.views import Batch, Views
from streams import schemas
from streams.envelope import Incoming, Outgoing
from streams.processors.cancellations import Cancellations
from streams.processors.finished import FinishedIndex
from streams.processors.intake import Intake
from streams.processors.llm_worker import LlmCalls
from streams.processors.orchestrator import Orchestrator
from streams.processors.tenure import Commit, Place, SnapshotDamagedError, SpecUnknownError, Tenure
from streams.processors.tool_worker import ToolCalls
from streams.registry import SpecRegistry
from streams.settings import Settings
from tools.registry import load

SCENE = Scene(b"i" * 16, b"d" * 16, 4, ids.run_id("open"), ids.run_id("over"))
SPECS: Final = {spec.digest: spec for spec in (HONEST, WAITING)}
LATER_MS = 1 << 50


class NobodyNewer:
    """The published schemas: today's, and no newer ones."""

    def newer(self, *_: object) -> bool:
        """Know of none."""
        return False

    def refuse_newer(self, *_: object) -> None:
        """Refuse nothing."""


class Known:
    """The workflow versions that are registered."""

    def get(self, version: str) -> Any:
        """Return a version."""
        return SPECS.get(version)

    def newest(self, workflow: str) -> Any:
        """Return the newest of a workflow."""
        return next((spec for spec in SPECS.values() if spec.name == workflow), None)

    def names(self) -> list[str]:
        """Return all names."""
        return [spec.name for spec in SPECS.values()]

    def refresh(self) -> None:
        """There is nothing more."""


def fits(records: Iterable[Outgoing]) -> None:
    """Assert that librdkafka takes these records: one that it refuses would stop the partition for good."""
    for record in records:
        headers = sum(len(name) + len(value or b"") + 10 for name, value in record.headers)
        size = len(record.key or b"") + len(record.value or b"") + headers + 200
        assert size < RECORD_LIMIT, f"a record of {size:,} bytes for {record.topic.name}"


def tenure(partition: int) -> Tenure:
    """Return the tenure of a partition whose log is still to be read."""
    place = Place(SCENE.inbox_id, SCENE.decisions_id, partition, SCENE.partitions)
    return Tenure(place, SPECS.get, Commit(0, 0), pack_at=1)


def inbox(run_id: str, said: Any, offset: int) -> Incoming:
    """Return an honest input."""
    return Incoming("f.inbox", 0, offset, 1, run_id.encode(), codec.encode(InboxMessage(run_id, said)), {})


def settled(owner: Tenure) -> None:
    """Settle what an owner has decided, write what follows, pack the index, and put its runs on the shelf."""
    owner.settle(list(range(owner.end, owner.end + len(owner._own))))
    fits(owner.index_entries())
    if owner.pack_due:
        fits(owner.pack())
    owner.commit()
    fits(owner.keep_idle(LATER_MS))


def requests(records: list[Incoming], _: Path) -> None:
    """Judge requests."""
    for record in records:
        fits(Intake(Known(), b"t" * 16).check(record))


def inputs(records: list[Incoming], _: Path) -> None:
    """Judge inputs, in a partition that has an open run and was read to its end."""
    for record in records:
        owner = tenure(record.partition)
        owner.begin(0)
        if SCENE.home(SCENE.open) == record.partition:
            owner.take(inbox(SCENE.open, StartRun("open", WAITING.name, WAITING.digest, "{}"), 0))
        try:
            fits(owner.take(record))
        except SpecUnknownError:
            fits(owner.take(record, give_up=True))
        settled(owner)


def calls(make: Callable[[Settings], Any]) -> Callable[[list[Incoming], Path], None]:
    """Return what makes the calls of a queue, and gives them up."""

    def judged(records: list[Incoming], folder: Path) -> None:
        handler = make(Settings(data_dir=folder, local_model_url="http://127.0.0.1:9"))
        for record in records:
            fits([asyncio.run(handler(record)), handler.cancelled(record, "nobody waits", None)])

    return judged


def cancellations(records: list[Incoming], _: Path) -> None:
    """Take cancellations."""
    view = Cancellations(Settings(bootstrap_servers="127.0.0.1:9"), NobodyNewer())  # type: ignore[arg-type]
    try:
        for record in records:
            view._take(record.value)
    finally:
        view.close()


def registry(records: list[Incoming], folder: Path) -> None:
    """Take workflow versions, and compile whatever is known then; the honest one stays the newest of its name."""
    known = SpecRegistry(Settings(bootstrap_servers="127.0.0.1:9"), NobodyNewer())  # type: ignore[arg-type]
    try:
        known._take(0, codec.encode(WorkflowRegistered(HONEST.name, HONEST.digest, HONEST.canonical)), 0)
        for record in records:
            known._take(record.offset, record.value, record.timestamp)
        assert known.newest(HONEST.name) == HONEST
        for name in known.names():
            known.newest(name)
            for version in known.versions(name):
                known.get(version.digest)
    finally:
        known.close()
    views("specs")(records, folder)


def published(records: list[Incoming], _: Path) -> None:
    """Take published schemas: none of them counts."""
    assert [record for record in records if schemas._entry(record.value)] == []


def reported(records: list[Incoming], _: Path) -> None:
    """Show reports as `foldflow workers` does."""
    reports = [report for record in records if record.value is not None and (report := workers._decoded(record.value))]
    seen = [workers.Seen(report, age_ms) for report in reports for age_ms in (0, 1 << 62)]
    amiss = workers.problems(seen, [])
    json.dumps(workers._as_json(seen, [], amiss))
    workers._show(seen, [], amiss)


def taken_over(read: Callable[[Tenure, Incoming], Any]) -> Callable[[list[Incoming], Path], None]:
    """Return what reads records as a new owner does, and then goes on with whatever runs came of them."""

    def judged(records: list[Incoming], _: Path) -> None:
        for record in records:
            owner = tenure(record.partition)
            with suppress(NotDecodableError):  # the orchestrator passes over these
                read(owner, record)
            owner.begin(1)
            with suppress(SnapshotDamagedError):  # it begins again without that snapshot: shown in test_poison.py
                fits(owner.due(LATER_MS))
                owner.next_timer()
                for offset, run_id in enumerate([*owner.runs, NO_RUN], 1):
                    fits(owner.take(inbox(run_id, SIGNAL, offset), give_up=True))
                settled(owner)

    return judged


def history(records: list[Incoming], folder: Path) -> None:
    """Read decisions as a new owner does, and as the views do."""
    taken_over(lambda owner, record: owner.read(record.offset, record.value))(records, folder)
    views("decisions")(records, folder)


def views(topic: str) -> Callable[[list[Incoming], Path], None]:
    """Return what takes records into the read models."""

    def judged(records: list[Incoming], folder: Path) -> None:
        names = {name: name.encode().ljust(16)[:16] for name in topics.TOPICS}
        made = Views(folder / "views", names, SCENE.partitions)
        try:
            made.apply(Batch(**{topic: [Record(record.partition, record.offset, record.value) for record in records]}))
        finally:
            made.close()

    return judged


def letters(records: list[Incoming], folder: Path) -> None:
    """Take dead letters into the read model, and as the command that lists them does."""
    views("deadletters")(records, folder)
    found: dict[tuple[str, int, int], Entry] = {}
    for record in records:
        take(found, record)
    for entry in found.values():
        json.dumps(deadletters._as_json(entry))
    deadletters._print_table([*found.values()])


JUDGES: Final[dict[str, Callable[[list[Incoming], Path], None]]] = {
    "requests": requests,
    "inbox": inputs,
    "tool.calls": calls(lambda settings: ToolCalls(settings, load(()))),
    "llm.calls": calls(LlmCalls),
    "cancellations": cancellations,
    "specs": registry,
    "schemas": published,
    "workers": reported,
    "deadletter": letters,
    "decisions": history,
    "finished": taken_over(lambda owner, record: owner.index_read(record.offset, record.key, record.value)),
    "snapshots": taken_over(lambda owner, record: owner.snapshot_read(record.key, record.value, record.headers)),
}


def incoming(topic: topics.Topic, shot: Shot, offset: int) -> Incoming:
    """Return a record as it is read. A header's name that is no UTF-8 can't come from the client library like that."""
    headers = {name if isinstance(name, str) else "?": value for name, value in shot.headers}
    return Incoming(f"f.{topic.name}", shot.partition or 0, offset, shot.timestamp, shot.key, shot.value, headers)


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: f"{poison.topic.name}: {poison.name}")
def test_nothing_raises_and_what_follows_fits(poison: Poison, tmp_path: Path) -> None:
    """Whatever stands on a topic, its readers come to its end."""
    records = [incoming(poison.topic, shot, 1000 + i) for i, shot in enumerate(poison.shots(SCENE))]
    JUDGES[poison.topic.name](records, tmp_path)


def test_a_version_that_nobody_registered_is_waited_for_once(tmp_path: Path) -> None:
    """Starts that name the same one hold a partition up once, however many there are; another one is waited for by itself."""
    settings = Settings(data_dir=tmp_path, bootstrap_servers="127.0.0.1:9")
    orchestrator, owner = Orchestrator(settings), tenure(0)
    orchestrator.specs = Known()  # type: ignore[assignment]
    owner.begin(0)
    ours = [name for i in range(100) if SCENE.home(ids.run_id(name := f"unknown-{i}")) == 0]

    def started(offset: int, version: str, *, patient: bool = True) -> list[str]:
        name = ours[offset]
        record = inbox(ids.run_id(name), StartRun(name, "gone", version, "{}"), offset)
        return [each.topic.name for each in orchestrator._judged(owner, record, give_up=not patient)]

    with pytest.raises(SpecUnknownError):
        started(0, "a" * 64)
    assert started(0, "a" * 64, patient=False) == ["decisions"]
    assert started(1, "a" * 64) == ["decisions"]
    with pytest.raises(SpecUnknownError):
        started(2, "b" * 64)


def test_a_forged_pack_hides_no_run_that_is_over() -> None:
    """What is looked for by halves is in order whatever somebody puts there: a run that isn't found would start again."""
    place = Place(SCENE.inbox_id, SCENE.decisions_id, 0, 1)
    runs = sorted(ids.run_id(f"over-{i}") for i in range(100))
    honest = FinishedIndex(place)
    for offset, run_id in enumerate(runs):
        honest[run_id] = offset
    (pack,) = honest.pack()
    forged = b"\xff" * 24 + b"\0" * 24 * 1000
    for order in ((forged, None), (None, forged)):
        index = FinishedIndex(place)
        for offset, each in enumerate(order):
            value = pack.value if each is None else codec.encode(FinishedRuns(SCENE.decisions_id, each))
            index.read(offset, b"packed/1/0", value)
        assert [index.get(run_id) for run_id in runs] == list(range(100))
