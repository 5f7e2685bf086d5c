"""Pictures of runs: what they tell, and that whatever stands in a run, they are SVG that a browser draws."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_histories import PARTITIONS, RICH, TOPIC_IDS, logs  # type: ignore[import-not-found]

from events import codec
from events.commands import WorkflowRegistered
from events.topics import partition_for
from projections import runs
from projections.ledger import Record
from projections.picture import picture
from projections.picture_cards import MOST_CARDS, story
from projections.picture_layout import GAP, layered
from projections.views import Batch, Views
from streams.testing import Failure
from streams.testing import given as run_of
from streams.testing.histories import read
from streams.workflow.definition import parse
from streams.workflow.spec import WorkflowSpec

HISTORIES = Path(__file__).parents[1] / "histories"


@contextmanager
def viewed(folder: Path, records: list[Record], *specs: WorkflowSpec) -> Iterator[Any]:
    """Give a connection to views of these records."""
    registered = [
        Record(0, number, codec.encode(WorkflowRegistered(each.name, each.digest, each.canonical)))
        for number, each in enumerate(specs)
    ]
    views = Views(folder / "v", TOPIC_IDS, PARTITIONS)
    try:
        views.apply(Batch(records, specs=registered))
        with views.snapshot() as (db, _):
            yield db
    finally:
        views.close()


@contextmanager
def recorded(folder: Path, name: str, histories: Path = HISTORIES) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Give a connection to views of a recorded history, and its run's row."""
    found = read(histories / f"{name}.json")
    assert found.spec is not None
    partition = partition_for(found.run_id.encode(), PARTITIONS)
    records = [Record(partition, number, value) for number, value in enumerate(found.values)]
    with viewed(folder, records, found.spec) as db:
        run = runs.one(db, found.run_id)
        assert run is not None
        yield db, run


def texts(svg: str) -> list[str]:
    """Return all texts of a picture; raises if it is no XML."""
    return [each.text or "" for each in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - ours


def test_the_picture_of_the_market_analysis_tells_the_story(tmp_path: Path) -> None:
    """Given the recorded market analysis, then its picture has the question, each step, who approved, files and result."""
    with recorded(tmp_path, "market_analysis-1") as (db, run):
        told = texts(picture(db, run))
        hidden = texts(picture(db, run, payloads=False))
    steps = {
        "understand",
        "check",
        "parse_by_rule",
        "plan",
        "fetch",
        "clean",
        "insights",
        "draft",
        "check_draft",
        "comment",
        "review",
    }
    assert steps | {"report", "release", "released", "What was asked", "Result", "How to read this:"} <= set(told)
    assert {"question: How did Apple do in 2004?", "approved by ann", "vega_datasets", "report.html and report.md"} <= set(told)
    assert {"rows", "from fetch", "used the tool clean_prices", "skipped: its condition did not hold", "completed"} <= set(told)
    assert not [each for each in hidden if "Apple" in each or "report.html" in each]
    assert steps <= set(hidden)


@pytest.mark.parametrize("name", sorted(path.stem for path in HISTORIES.glob("*.json")))
def test_each_recorded_history_has_a_picture(tmp_path: Path, name: str) -> None:
    """Given a history of each kind that is recorded, then its picture is XML and names the workflow and how the run ended."""
    with recorded(tmp_path, name) as (db, run):
        told = texts(picture(db, run))
    assert any(run["workflow"] in each for each in told)
    assert run["status"] in told


def test_runs_of_every_kind_of_step_under_way_have_pictures(tmp_path: Path) -> None:
    """Given random histories of all kinds of steps, over or not, with and without their definition, then each has a picture."""
    log = logs(5, 12, 0.2, (RICH,))
    for number, specs in enumerate([(RICH,), ()]):
        (tmp_path / str(number)).mkdir()
        with viewed(tmp_path / str(number), log.records(), *specs) as db:
            for row in runs.newest(db, runs.Filter(), 100):
                run = runs.one(db, row["run_id"])
                assert run is not None
                assert "What was asked" in texts(picture(db, run))


FAILED = """
name: trip
compensations:
  leave: {tool: {name: leave, arguments: {id: "=output"}}}
  refund: {tool: {name: refund}}
steps:
  room: {tool: {name: room, arguments: {for: "=input.who"}}, compensation: leave}
  pay: {needs: [room], tool: {name: pay, arguments: {by: "=input.who"}}, compensation: refund}
  boom: {needs: [pay], tool: {name: boom, arguments: {for: "=input.who"}}}
"""
TIDY = """
finally:
  tidy: {tool: {name: tidy}}
"""


@pytest.mark.parametrize("more", ["", TIDY])
def test_a_failed_run_s_picture_says_what_came_before_what(tmp_path: Path, more: str) -> None:
    """Given steps that use only the question, and that were undone, then lines say which of them came before which.

    What was undone comes after what failed, latest first, then what cleans up; only the last of all leads to the result.
    """
    flow = parse((FAILED + more).encode(), "trip.yaml")
    tools = {"room": 7, "pay": 1, "boom": Failure("tool_terminal", "no"), "leave": 1, "refund": 1, "tidy": 1}
    played = run_of(flow, input={"who": "ann"}, tools=tools).then_undone(["pay", "room"])
    played.save(tmp_path / "trip.json")
    with recorded(tmp_path, "trip", tmp_path) as (db, run):
        told = story(db, run)
    short = {"input": "asked", "output": "result"}
    lines = {
        (short.get(source[0], source[-1]), short.get(target[0], target[-1]), arrow.style)
        for arrow in told.arrows
        for source, target in [(arrow.source.split("/"), arrow.target.split("/"))]
    }
    assert lines == {
        *[("asked", each, "data") for each in ("room", "pay", "boom")],
        ("room", "pay", "order"),
        ("pay", "boom", "order"),
        ("boom", "undo(pay)", "order"),
        ("pay", "undo(pay)", "order"),
        ("undo(pay)", "undo(room)", "order"),
        ("room", "undo(room)", "data"),
        *(
            [
                ("undo(room)", "finally.tidy", "order"),
                ("finally.tidy", "finally", "data"),
                ("finally", "result", "order"),
            ]
            if more
            else [("undo(room)", "result", "order")]
        ),
    }


def test_what_stands_in_a_run_is_only_text_in_its_picture(tmp_path: Path) -> None:
    """Given a question and a step's output full of markup and control characters, then the picture shows them as text."""
    evil = '</text><script>alert(1)</script>&amp;"\x00\x1b\ud7ff\ufffe'
    with recorded(tmp_path, "market_analysis-1") as (db, run):
        svg = picture(
            db, {**run, "workflow": evil, "input": f'{{"question": "{evil[:30]}"}}', "failure_message": evil, "status": "failed"}
        )
    assert "<script" not in svg
    assert any("<script>alert(1)</script>" in each for each in texts(svg))


def test_a_picture_of_a_thousand_items_is_as_small_as_one_of_ten(tmp_path: Path) -> None:
    """Given a run whose step has 1,000 items and one of 200 steps, then the first has one card for all, the other what fits."""
    many = WorkflowSpec.model_validate(
        {"name": "many", "steps": {"each": {"for_each": {"items": "=input.n"}, "transform": "=item"}}}
    )
    long = WorkflowSpec.model_validate({"name": "long", "steps": {f"s{number}": {"transform": number} for number in range(200)}})
    log = logs(0, 0, 0.0)
    ids = [_started(log, many, f'{{"n":{list(range(1000))}}}'), _started(log, long, "{}")]
    with viewed(tmp_path, log.records(), many, long) as db:
        big, cut = (picture(db, runs.one(db, each) or {}) for each in ids)
    assert "once for each of 1,000 items" in texts(big)
    assert len(big) < 20_000
    assert sum(each.startswith("s1") for each in texts(cut)) < MOST_CARDS
    assert any("50 steps are not drawn" in each for each in texts(cut))


def _started(log: Any, spec: WorkflowSpec, text: str) -> str:
    from projection_histories import Run  # noqa: PLC0415

    from events.commands import StartRun  # noqa: PLC0415
    from events.ids import run_id  # noqa: PLC0415
    from streams.workflow.state import INITIAL  # noqa: PLC0415

    run = Run(run_id(spec.name), spec=spec)
    decision = log._decided(run, INITIAL, StartRun(spec.name, spec.name, spec.digest, text))
    log.append(run.id, codec.encode(decision))
    return str(run.id)


GRAPHS = st.integers(2, 14).flatmap(
    lambda size: st.tuples(
        st.lists(st.tuples(st.integers(40, 300), st.integers(20, 90)), min_size=size, max_size=size),
        st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=3 * size),
    )
)


@settings(max_examples=60, deadline=None)
@given(GRAPHS)
def test_nothing_overlaps_and_lines_go_down(graph: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    """Given any cards and lines, circles too, then no two boxes of a layer overlap and each line goes to the next layer."""
    cards = {f"c{number}": (float(width), float(height)) for number, (width, height) in enumerate(graph[0])}
    layout = layered(cards, [(f"c{a}", f"c{b}") for a, b in graph[1] if a != b])
    assert {key for key, box in layout.boxes.items() if not box.is_lane} == set(cards)
    rows: dict[int, list[Any]] = {}
    for box in layout.boxes.values():
        rows.setdefault(box.layer, []).append(box)
        assert box.x - box.width / 2 >= -0.01
        assert box.x + box.width / 2 <= layout.width + 0.01
    for row in rows.values():
        row.sort(key=lambda box: box.x)
        for left, right in pairwise(row):
            assert left.x + left.width / 2 <= right.x - right.width / 2 + 0.01
    for line in layout.lines:
        upper, lower = layout.boxes[line.source], layout.boxes[line.target]
        assert lower.layer == upper.layer + 1
        assert lower.y >= upper.y + upper.height + GAP - 0.01
        assert abs(lower.ports[line.of]) <= lower.width / 2
