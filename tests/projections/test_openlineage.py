"""OpenLineage events of recorded and of random histories: what they must be, by OpenLineage's schemas and by the ledger."""

import json
import random
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from jsonschema import Draft202012Validator
from projection_histories import BOTH, SPECS, TOPIC_IDS, logs  # type: ignore[import-not-found]
from referencing import Registry, Resource

from events import codec
from events.commands import StartRun, WorkflowRegistered
from events.decisions import Decision
from events.ids import chain_hash
from infra.openlineage.receivers import Http, StoppedError, endpoint
from projections.ledger import Record
from projections.lineage import Asked, lineage
from projections.lineage_data import Definition
from projections.openlineage import Event, Family, OpenLineage, family_of
from projections.openlineage_datasets import read_and_written
from projections.views import Batch, Views
from streams.testing.histories import read
from streams.workflow.state import RunEvent

HERE = Path(__file__).parent
HISTORIES = sorted((HERE.parent / "histories").glob("*.json"))
WHOLE = [path for path in HISTORIES if path.stem in ("market_analysis-2", "people", "steps_of_steps")]
"""Those whose steps all ran: what feeds one that was cancelled before it began is lineage, and nothing to tell."""
ENDS = {"COMPLETE", "FAIL", "ABORT"}


@cache
def schemas() -> Registry[Any]:
    """Return OpenLineage's schemas and ours, by their addresses."""
    paths = [*(HERE / "openlineage_spec").glob("*.json"), HERE.parents[1] / "docs" / "openlineage-facets.json"]
    found = [json.loads(path.read_text()) for path in paths]
    return Registry().with_resources([(each["$id"], Resource.from_contents(each)) for each in found])


@cache
def validator(address: str) -> Draft202012Validator:
    """Return what checks a value against the schema at an address."""
    return Draft202012Validator({"$ref": address}, registry=schemas(), format_checker=Draft202012Validator.FORMAT_CHECKER)


def check(event: dict[str, Any]) -> None:
    """Check an event and each of its facets against the schemas that they name."""
    validator(event["schemaURL"]).validate(event)
    datasets = [*event["inputs"], *event["outputs"]]
    for holder in (event["run"], event["job"], *datasets):
        for facet in holder["facets"].values():
            validator(facet["_schemaURL"]).validate(facet)
    assert not any({"inputFacets", "outputFacets"} & {key for key, value in each.items() if value} for each in datasets)


@cache
def recorded(path: Path) -> tuple[tuple[RunEvent, ...], Any]:
    """Return a recorded history's decisions, and its definition."""
    found = read(path)
    values = [(codec.decode(value, Decision), chain_hash(codec.unframed(value))) for value in found.values]
    return tuple(RunEvent(*each) for each in values), found.spec


def teller(specs: Iterable[Any], starts: dict[str, StartRun] | None = None) -> OpenLineage:
    """Return what tells runs of these workflows; `starts`: how all runs began."""
    known = {spec.digest: Definition(spec) for spec in specs if spec is not None}

    def parent(run_id: str, levels: int = 0) -> Family | None:
        start = (starts or {}).get(run_id)
        if start is None:
            return None
        above = parent(start.parent.run_id, levels + 1) if start.parent and levels < 100 else None
        return family_of(run_id, start.workflow, above)

    return OpenLineage("space", known.get, parent)


def told(events: Iterable[RunEvent], specs: Iterable[Any]) -> list[Event]:
    """Return what is told of decisions that count."""
    given = list(events)
    starts = {each.decision.run_id: each.decision.input for each in given if isinstance(each.decision.input, StartRun)}
    telling = teller(specs, starts)
    return [found for each in given for found in telling.take(each.decision, each.hash)]


def parsed(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [json.loads(each.value) for each in events]


def cycle_of(events: list[dict[str, Any]], over: set[str]) -> None:
    """Check that each OpenLineage run begins once, ends once if its run is over, and says nothing after that."""
    by_run: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_run[event["run"]["runId"]].append(event)
    for run, mine in by_run.items():
        whole = mine[0]["run"]["facets"]["foldflow_ledger"]["runId"]
        states = [event["eventType"] for event in mine]
        assert states[0] == "START", run
        assert states[1:] in [[end] for end in ENDS] or (states == ["START"] and whole not in over), (run, states)
        assert len({event["job"]["name"] for event in mine}) == 1
        if run != whole:
            assert {event["run"]["facets"]["parent"]["run"]["runId"] for event in mine} == {whole}


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_recorded_histories_are_told_as_the_specification_wants_it(path: Path) -> None:
    """Given a recorded history, then each event and facet fits its schema, and each run of a job begins and ends once."""
    events, spec = recorded(path)
    found = parsed(told(events, [spec]))
    for event in found:
        check(event)
    cycle_of(found, {events[0].decision.run_id})
    end = {"failed": "FAIL", "saga": "ABORT"}.get(path.stem, "COMPLETE")
    assert [found[0]["eventType"], found[-1]["eventType"]] == ["START", end]


@pytest.mark.parametrize("seed", range(2))
def test_any_history_is_told_so(seed: int) -> None:
    """Given random histories of all kinds of steps and inputs, then it holds for them, whatever came late or twice."""
    log = logs(seed, 16, 0.3, BOTH)
    found = parsed(told(log.accepted, SPECS.values()))
    for event in found[:: 1 if seed == 0 else 10]:
        check(event)
    cycle_of(found, {run_id for run_id, state in log.states.items() if state.over})
    assert {event["eventType"] for event in found} == {"START", *ENDS}


def test_whoever_begins_again_tells_the_same() -> None:
    """Given one who was killed anywhere and reads the runs again from their beginnings, then it goes on to the byte.

    Neither does it matter in which order runs are told.
    """
    log = logs(7, 10, 0.2, BOTH)
    starts = {each.decision.run_id: each.decision.input for each in log.accepted if isinstance(each.decision.input, StartRun)}
    whole = told(log.accepted, SPECS.values())
    rng = random.Random(7)  # noqa: S311 - a place to be killed at, no secret
    killed = rng.randrange(len(log.accepted))
    again = teller(SPECS.values(), starts)
    later = [
        event
        for number, each in enumerate(log.accepted)
        for event in again.take(each.decision, each.hash, wanted=number >= killed)
    ]
    assert later == whole[len(whole) - len(later) :]
    assert 0 < len(later) < len(whole)
    by_run = sorted(log.accepted, key=lambda each: each.decision.run_id)
    assert sorted(each.value for each in told(by_run, SPECS.values())) == sorted(each.value for each in whole)


def pairs(path: Path, tmp_path: Path) -> set[tuple[str, str]]:
    """Return what feeds which step by `foldflow lineage`, in the words of OpenLineage; numbers of items left out."""
    events, spec = recorded(path)
    run_id = events[0].decision.run_id
    views = Views(tmp_path / "v", TOPIC_IDS, 1)
    values = read(path).values
    registered = [Record(0, 0, codec.encode(WorkflowRegistered(spec.name, spec.digest, spec.canonical)))]
    views.apply(Batch([Record(0, number, value) for number, value in enumerate(values)], specs=registered))
    with views.snapshot() as (db, _):
        found = lineage(db, Asked(run_id, files=False))
    views.close()
    name: Callable[[str], str] = lambda node: node.partition("/")[2].partition("/")[2]  # noqa: E731
    fed = set()
    for edge in found.edges:
        is_data = edge.source.startswith("input/") or edge.of.startswith("output") or not edge.of
        if (
            edge.kind == "feeds"
            and is_data
            and edge.source.partition("/")[0] in ("step", "input")
            and edge.target.startswith("step/")
        ):
            source = f"{spec.name}.input" if edge.source.startswith("input/") else f"{spec.name}.{name(edge.source)}.output"
            # What a step has that starts another workflow's run is that run's output.
            source = {"steps-of-steps.group.odd.output": "odd.output"}.get(source, source)
            fed.add((re.sub(r"\[\d+\]", "[]", source), re.sub(r"\[\d+\]", "[]", f"{spec.name}.{name(edge.target)}")))
    return fed


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_datasets_are_those_of_data_lineage(path: Path, tmp_path: Path) -> None:
    """Given a run, then what its steps read is exactly what `foldflow lineage` shows."""
    events, spec = recorded(path)
    found = parsed(told(events, [spec]))
    read = {
        (given["name"], event["job"]["name"])
        for event in found
        for given in event["inputs"]
        if given["namespace"] == "space" and event["job"]["name"] != spec.name
    }
    assert read == pairs(path, tmp_path)
    assert len(read) > 15 or not spec.name.startswith("market")
    written = {each["name"] for event in found for each in event["outputs"]}
    known = {*written, f"{spec.name}.input", "odd.output"}
    assert {name for name, _ in read} <= known, "what is read was written by somebody, here or in another run"


def test_the_words_for_what_happened() -> None:
    """Given calls that fail, are tried again and take too long, then each attempt is told with its number, end and cause."""
    events, spec = recorded(HERE.parent / "histories" / "calls.json")
    ends = [event for event in parsed(told(events, [spec])) if event["eventType"] != "START"]
    facets = [event["run"]["facets"] for event in ends]
    assert [
        (
            event["eventType"],
            event["job"]["name"],
            each["foldflow_ledger"].get("attempt"),
            each.get("errorMessage", {}).get("message"),
        )
        for event, each in zip(ends, facets, strict=True)
    ] == [
        ("FAIL", "calls.fetch", 1, "unavailable: down"),
        ("FAIL", "calls.fetch", 2, "rate_limited: too often"),
        ("FAIL", "calls.slow", 1, "timeout: no answer within 2000 ms"),
        ("FAIL", "calls.slow", 2, "timeout: no answer within 2000 ms"),
        ("COMPLETE", "calls.fetch", 3, None),
        ("FAIL", "calls.title", 1, "unavailable: no answer"),
        ("COMPLETE", "calls.title", 2, None),
        ("FAIL", "calls.slow", 3, "timeout: no answer within 2000 ms"),
        ("COMPLETE", "calls.wait", None, None),
        ("COMPLETE", "calls", None, None),
    ]
    title = facets[6]["foldflow_call"]
    assert (title["model"], title["inputTokens"], title["finishReason"]) == ("scripted", 0, "stop")
    assert ends[-1]["outputs"][0]["facets"]["columnLineage"]["fields"] == {
        "title": {"inputFields": [{"namespace": "space", "name": "calls.title.output", "field": "title", "transformations": []}]}
    }


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("vega_datasets", ("file", "vega_datasets")),
        ("/data/prices.csv", ("file", "/data/prices.csv")),
        ("C:\\prices.csv", ("file", "C:\\prices.csv")),
        ("file:///data/prices.csv", ("file", "/data/prices.csv")),
        ("file://host/data/prices.csv", ("file://host", "/data/prices.csv")),
        ("s3://bucket/a/b.parquet", ("s3://bucket", "a/b.parquet")),
        ("gs://bucket/b.parquet", ("gs://bucket", "b.parquet")),
        ("abfss://box@account.dfs.core.windows.net/b", ("abfss://box@account.dfs.core.windows.net", "b")),
        ("postgres://me:secret@db:5432/shop.public.orders", ("postgres://db:5432", "shop.public.orders")),
        ("https://me:secret@example.org/a.csv?signature=secret", ("https://example.org", "/a.csv")),
        ("http://[bad/a.csv", ("file", "http://[bad/a.csv")),
    ],
)
def test_files_and_addresses_have_the_names_that_openlineage_gives_them(path: str, dataset: tuple[str, str]) -> None:
    """Given a tool that says what it has read, then the dataset's name is OpenLineage's, and nothing secret is in it."""
    said = json.dumps({"source": path, "sha256": "ab" * 32})
    (read,), written = read_and_written(said, "run-1")
    assert (read.namespace, read.name) == dataset
    assert written == []
    assert "secret" not in str(read)
    assert read.facets is not None
    assert read.facets["version"].datasetVersion == f"sha256:{'ab' * 32}"  # type: ignore[attr-defined]


def test_a_file_that_a_run_writes_is_the_same_dataset_in_each_run() -> None:
    """Given a path in the run's own folder, then the run's id isn't part of the name, and the facet has the whole path."""
    read, (written,) = read_and_written('{"html": "reports/run-1/report.html"}', "run-1")
    assert read == []
    assert (written.namespace, written.name) == ("file", "reports/{run}/report.html")
    assert written.facets is not None
    assert written.facets["foldflow_file"].path == "reports/run-1/report.html"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/api/v1/lineage"),
        ("http://127.0.0.1:5000/", "http://127.0.0.1:5000/api/v1/lineage"),
        ("https://hub.example/openapi/openlineage/", "https://hub.example/openapi/openlineage/api/v1/lineage"),
        ("https://meta.example/api/v1/openlineage/lineage", "https://meta.example/api/v1/openlineage/lineage"),
    ],
)
def test_where_a_receiver_takes_events(address: str, where: str) -> None:
    """Given a receiver's address, then events go where OpenLineage's own client sends them, or exactly there."""
    assert endpoint(address) == where


@pytest.mark.parametrize("address", ["127.0.0.1:5000", "ftp://example.org", "http://", "http://me:secret@example.org"])
def test_what_is_no_address_is_refused(address: str) -> None:
    """Given what is no address, or one with a password in it, then that is said before anything is read."""
    with pytest.raises(ValueError, match="address"):
        endpoint(address)


class _Moody(BaseHTTPRequestHandler):
    """Answers 503 twice, and then 201."""

    asked: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.asked.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(503 if len(self.asked) <= 2 else 201)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_receiver_that_has_no_time_is_asked_again_in_order() -> None:
    """Given a receiver that answers 503 at first, then it is asked again with the same event, and that is said once.

    Whoever is told to stop meanwhile stops.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said, stop = list[str](), threading.Event()
    receiver = Http(f"http://127.0.0.1:{server.server_address[1]}", None, said.append, stop)
    receiver.send([Event("run-1", 0, "START of one", b"1"), Event("run-1", 1, "COMPLETE of one", b"2")])
    server.shutdown()
    server.server_close()
    assert _Moody.asked == [b"1", b"1", b"1", b"2"]
    assert ["503 to START of one of run run-1; waiting" in said[0], "takes events again" in said[1], len(said)] == [True, True, 2]
    stop.set()
    with pytest.raises(StoppedError):
        receiver.send([Event("run-1", 2, "START of two", b"3")])
