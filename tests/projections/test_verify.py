"""A ledger is checked from an archive of it: honest logs are whole, and whatever is changed is found and named."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from projection_histories import BOTH, RICH, SPEC, SPECS, Logs, Row, as_kcat, as_kcat_values, logs
from typer.testing import CliRunner, Result

from events import codec, ids
from events.commands import WorkflowRegistered
from events.decisions import Decision, RunCompleted
from infra.cli.main import command_line
from projections import export_files, verify
from projections.replay_parallel import each_partition
from projections.replay_sources import ArchiveError, Source, archive
from streams.workflow.payloads import NoPayloads
from streams.workflow.state import RunStatus

Values = list[list[bytes | None]]
CANONICAL = {digest: spec.canonical for digest, spec in SPECS.items()}
HEADERS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))


def rows_of(values: Values) -> list[Row]:
    return [(partition, offset, value) for partition, of in enumerate(values) for offset, value in enumerate(of)]


def kcat(path: Path, values: Values, specs: Iterable[bytes] = (), claims: Values | None = None) -> Path:
    """Write what kcat does. `claims`: what was there when the headers were made, by default the same."""
    behind = [(0, offset, value) for offset, value in enumerate(specs)]
    said = [value for *_, value in (*rows_of(claims or values), *behind)]
    path.write_bytes(as_kcat([*rows_of(values), *behind], said))
    return path


def folder(path: Path, values: Values, *, left_out: frozenset[tuple[int, int]] = frozenset(), **options: Any) -> Path:
    """Write what `foldflow export` writes; headers as they were, whatever became of the values."""
    for partition, of in enumerate(values):
        rows = [
            {
                "partition": partition,
                "offset": offset,
                "timestamp": 1_700_000_000_000 + offset * 1000,
                "key": None,
                "value": value,
                "headers": [("ce_id", ids.chain_hash(codec.unframed(value or b"")).hex().encode())],
            }
            for offset, value in enumerate(of)
            if (partition, offset) not in left_out
        ]
        half = len(rows) // 2
        for day, part in (("2023-11-14", rows[:half]), ("2023-11-15", rows[half:])) if half else ():
            file = path / "decisions" / f"day={day}" / f"p{partition}-{part[0]['offset']}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            kinds = (pa.int32(), pa.int64(), pa.timestamp("ms", "UTC"), pa.binary(), pa.binary(), HEADERS)
            names = ("partition", "offset", "timestamp", "key", "value", "headers")
            schema = pa.schema(list(zip(names, kinds, strict=True)))
            pq.write_table(pa.Table.from_pylist(part, schema=schema), file, write_page_checksum=True, **options)
    return path


def honest(seed: int = 1, runs: int = 6) -> Logs:
    return logs(seed, runs, 0.0, BOTH)


def checked(source: Source | Path, canonical: dict[str, str] = CANONICAL, only: frozenset[bytes] | None = None) -> verify.Result:
    """Check an archive in this process."""
    found = archive(source) if isinstance(source, Path) else source
    return verify.together(each_partition(verify.Check(found, canonical, NoPayloads, only), found.spans(), 1, lambda _: None))


def places(result: verify.Result) -> set[tuple[int, int]]:
    return {(each.partition, each.offset) for each in result.findings}


def runs_of(values: Sequence[bytes | None]) -> dict[str, list[int]]:
    """Return the offsets of each run's decisions in a partition of an honest log."""
    found: dict[str, list[int]] = {}
    for offset, value in enumerate(values):
        found.setdefault(codec.decode(value, Decision).run_id, []).append(offset)
    return found


# --- What is honest ---


def test_an_honest_log_is_whole(tmp_path: Path) -> None:
    """Every kind of step, command and answer: each decision is decided again and comes out the same, to the byte."""
    made = honest(runs=10)
    result = checked(kcat(tmp_path / "log", made.partitions))
    assert (result.findings, result.ignored, result.unchecked) == ([], {}, {})
    assert result.decisions == result.again == len(made.accepted)
    assert result.runs == 10
    assert result.open == sum(not state.over for state in made.states.values())


def test_what_honest_writers_may_cause_is_counted_and_what_they_can_t_is_found(tmp_path: Path) -> None:
    """Losers, repetitions and old decisions are passed over; garbage, and runs of which a record is missing, are findings."""
    for seed in range(3):
        made = logs(seed, 12, 0.2, BOTH)
        result = checked(kcat(tmp_path / "log", made.partitions))
        assert result.decisions == result.again == len(made.accepted)
        assert result.ignored["overtaken"] > 0
        assert {each.run_id for each in result.findings if each.kind == "missing"} == made.broken
        assert {each.kind for each in result.findings} <= {"missing", "unreadable"}
        garbage = {
            (partition, offset)
            for partition, of in enumerate(made.partitions)
            for offset, value in enumerate(of)
            if value is None or len(value) < 20
        }
        assert {(each.partition, each.offset) for each in result.findings if each.kind == "unreadable"} == garbage


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    """Partitions are checked apart, in processes of their own; what is read is told meanwhile."""
    made = logs(1, 12, 0.2, BOTH)
    source = archive(kcat(tmp_path / "log", made.partitions))
    told: list[int] = []
    job = verify.Check(source, CANONICAL, NoPayloads)
    result = verify.together(each_partition(job, source.spans(), 2, told.append))
    assert result == checked(source)
    assert sum(told) == len(made.order)


# --- A byte is changed ---


def changed(values: Values, partition: int, offset: int, byte: int, by: int) -> Values:
    value = bytearray(values[partition][offset] or b"")
    value[byte % len(value)] ^= by
    return [
        *values[:partition],
        [*values[partition][:offset], bytes(value), *values[partition][offset + 1 :]],
        *values[partition + 1 :],
    ]


def test_any_changed_byte_is_found_and_its_record_named(tmp_path: Path) -> None:
    """Whichever byte of whichever record of an exported archive: a finding names that record, as others may be of it too."""
    made = honest(runs=4)
    chance = random.Random(7)  # noqa: S311
    all_places = made.order
    original = folder(tmp_path / "whole", made.partitions)
    assert checked(original).whole
    for number in range(40):
        partition, offset = chance.choice(all_places)
        values = changed(made.partitions, partition, offset, chance.randrange(10_000), 1 << chance.randrange(8))
        # The headers are those of the record as it was.
        path = folder(tmp_path / f"{number}", values)
        _with_headers_of(original, path)
        result = checked(path)
        assert (partition, offset) in places(result), (partition, offset, result.findings)


def _with_headers_of(original: Path, path: Path) -> None:
    for file in sorted(path.rglob("*.parquet")):
        table, before = (
            pq.read_table(file, partitioning=None),
            pq.read_table(original / file.relative_to(path), partitioning=None),
        )
        index = table.schema.get_field_index("headers")
        pq.write_table(table.set_column(index, "headers", before["headers"]), file)


def test_without_headers_the_chain_finds_every_change_that_another_decision_follows(tmp_path: Path) -> None:
    """A file of kcat has values only. A change in a decision that others follow is found; nearly always its record is named."""
    made = honest(runs=4)
    chance = random.Random(5)  # noqa: S311
    last = {(partition, offsets[-1]) for partition, of in enumerate(made.partitions) for offsets in runs_of(of).values()}
    named = tried = 0
    for _ in range(60):
        partition, offset = chance.choice([place for place in made.order if place not in last])
        values = changed(made.partitions, partition, offset, chance.randrange(10_000), 1 << chance.randrange(8))
        result = checked(kcat(tmp_path / "log", values))
        assert not result.whole, (partition, offset)
        tried += 1
        named += (partition, offset) in places(result)
    assert named >= tried * 0.9


def test_a_changed_answer_is_told_by_the_decision_after_it(tmp_path: Path) -> None:
    """What no effect depends on can't come out differently: the next decision was written on top of other bytes."""
    made = honest(runs=2)
    partition, offset = next(
        (partition, offset)
        for partition, of in enumerate(made.partitions)
        for offset, value in enumerate(of)
        if value and b'"ok":true' in value and offset not in {offsets[-1] for offsets in runs_of(of).values()}
    )
    value = (made.partitions[partition][offset] or b"").replace(b'"ok":true', b'"ok":tru3')
    made.partitions[partition][offset] = value
    (finding,) = checked(kcat(tmp_path / "log", made.partitions)).findings
    assert (finding.kind, finding.partition, finding.offset) == ("changed", partition, offset)
    assert "a byte of it was changed" in finding.cause


def test_a_change_without_consequence_in_the_last_decision_is_told_by_its_header(tmp_path: Path) -> None:
    """Nothing follows it and no effect depends on it: only the hash in the record's header knows what stood there."""
    made = logs(1, 1, 0.0)
    partition = next(index for index, of in enumerate(made.partitions) if of)
    original = folder(tmp_path / "whole", made.partitions)
    last = codec.decode(made.partitions[partition][-1], Decision)
    made.partitions[partition][-1] = codec.encode(replace(last, input_offset=last.input_offset + 1))
    path = folder(tmp_path / "changed", made.partitions)
    assert checked(path).whole  # its header was made anew as well
    _with_headers_of(original, path)
    (finding,) = checked(path).findings
    assert (finding.kind, finding.partition, finding.offset) == ("header", partition, len(made.partitions[partition]) - 1)


def test_a_changed_byte_of_a_compressed_file_is_found(tmp_path: Path) -> None:
    """Anywhere in a Parquet file: in a page, a page's header or the footer."""
    made = honest(runs=3)
    path = folder(tmp_path / "a", made.partitions, compression="zstd")
    file = min(path.rglob("*.parquet"))
    whole, chance = file.read_bytes(), random.Random(3)  # noqa: S311
    found = 0
    for _ in range(25):
        at = chance.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            found += not checked(path).whole
        except ArchiveError:
            found += 1
    # What is left are bytes that say nothing of a record: statistics, names of the writer, the columns for other tools.
    assert found >= 15
    file.write_bytes(whole[: len(whole) // 2])
    result = checked(path)
    assert any(each.kind == "archive" and str(file) in each.problem for each in result.findings)


def test_a_record_that_was_taken_out_is_missed(tmp_path: Path) -> None:
    """An archive has every offset: also where the chain can't tell, as at a run's end."""
    made = honest(runs=3)
    partition = next(index for index, of in enumerate(made.partitions) if len(of) > 6)
    result = checked(folder(tmp_path / "a", made.partitions, left_out=frozenset({(partition, 4)})))
    assert any(each.kind == "missing" and "offsets 4 to 4" in each.problem for each in result.findings)


# --- Rewritten, with the whole chain made anew ---


def rehashed(values: list[bytes], number: int, change: Callable[[Decision], Decision]) -> list[bytes]:
    """Return a run's values with one decision changed, and all that depends on its hash recomputed behind it."""
    renamed: dict[str, str] = {}
    prev, found = ids.FIRST_PREV, []
    for index, value in enumerate(values):
        decision = replace(codec.decode(value, Decision), prev=prev)
        text = codec.body(decision)
        for old, new in renamed.items():  # ids of calls and timers have one length: the encoding stays what it is
            text = text.replace(old.encode(), new.encode())
        decision = codec.decode(codec.framed(Decision, text), Decision)
        decision = change(decision) if index == number else decision
        before, body = ids.chain_hash(codec.unframed(value)), codec.body(decision)
        prev = ids.chain_hash(body)
        renamed |= {ids.effect_id(before, effect): ids.effect_id(prev, effect) for effect in range(len(decision.effects))}
        found.append(codec.framed(Decision, body))
    return found


def test_a_run_that_was_rewritten_and_rehashed_is_found_by_deciding_again(tmp_path: Path) -> None:
    """The chain is whole from end to end, ids of calls too; and yet the output isn't what follows from the inputs."""
    made = logs(1, 6, 0.0)
    partition, offsets = next(
        (partition, offsets)
        for partition, of in enumerate(made.partitions)
        for run, offsets in runs_of(of).items()
        if made.states[run].status is RunStatus.COMPLETED
    )
    values = [made.partitions[partition][offset] or b"" for offset in offsets]
    assert rehashed(values, 0, lambda decision: decision) == values
    other = replace(codec.decode(values[-1], Decision).effects[-1], output='{"n":1000000}')
    assert isinstance(other, RunCompleted)
    forged = rehashed(values, len(values) - 1, lambda decision: replace(decision, effects=(*decision.effects[:-1], other)))
    for offset, value in zip(offsets, forged, strict=True):
        made.partitions[partition][offset] = value
    (finding,) = checked(kcat(tmp_path / "log", made.partitions)).findings
    assert (finding.kind, finding.partition, finding.offset) == ("rewritten", partition, offsets[-1])
    assert finding.field is not None
    assert finding.field.endswith(".output.n")
    assert finding.recorded == "1000000"


def test_a_rewritten_answer_in_the_middle_is_found_where_it_has_consequences(tmp_path: Path) -> None:
    """Each effect of each decision, changed and rehashed: found at that decision, and the rest of the log is whole."""
    made = honest(seed=3, runs=2)
    partition, run, offsets = max(
        ((partition, run, offsets) for partition, of in enumerate(made.partitions) for run, offsets in runs_of(of).items()),
        key=lambda each: len(each[2]),
    )
    values = [made.partitions[partition][offset] or b"" for offset in offsets]
    for number in range(0, len(values), 3):
        if len(codec.decode(values[number], Decision).effects) < 2:
            continue
        forged = rehashed(values, number, lambda decision: replace(decision, effects=decision.effects[:-1]))
        partitions = [list(of) for of in made.partitions]
        for offset, value in zip(offsets, forged, strict=True):
            partitions[partition][offset] = value
        result = checked(kcat(tmp_path / "log", partitions))
        first = result.findings[0]
        assert (first.kind, first.run_id, first.seq) == ("rewritten", run, number + 1)


def test_bytes_that_no_encoder_writes_are_found(tmp_path: Path) -> None:
    """The same contents in other bytes: a number written in two bytes where one is enough."""
    made = honest(runs=1)
    partition = next(index for index, of in enumerate(made.partitions) if of)
    value = made.partitions[partition][0] or b""
    assert value[42] == 2  # `seq` 1, zigzag
    made.partitions[partition] = [value[:42] + b"\x82\x00" + value[43:]]
    (finding,) = checked(kcat(tmp_path / "log", made.partitions)).findings
    assert (finding.kind, finding.field, finding.offset) == ("rewritten", "bytes", 0)


def test_a_decision_of_an_older_schema_is_compared_by_its_contents(tmp_path: Path) -> None:
    """Bytes that older code wrote are other ones, and nothing is wrong with them."""
    from io import BytesIO  # noqa: PLC0415

    from fastavro import parse_schema, schemaless_writer  # noqa: PLC0415

    old = Path(__file__).parents[2] / "events/schemas/history/Decision-70387487.avsc"
    made = honest(runs=1)
    partition = next(index for index, of in enumerate(made.partitions) if of)
    decision, out = codec.decode(made.partitions[partition][0], Decision), BytesIO()
    schemaless_writer(out, parse_schema(json.loads(old.read_text())), codec.datum(decision))
    made.partitions[partition] = [codec.FRAME.pack(0, 70387487) + out.getvalue()]
    result = checked(kcat(tmp_path / "log", made.partitions))
    assert (result.whole, result.again) == (True, 1)


# --- What can't be looked at ---


def test_a_log_without_its_beginning_is_checked_as_far_as_it_is_there(tmp_path: Path) -> None:
    """Runs that began before are not decided again, and are no findings; those that begin there are checked as ever."""
    made = honest(runs=6)
    cut = frozenset((partition, offset) for partition in range(3) for offset in range(5))
    values: Values = [of if len(of) > 12 else [] for of in made.partitions]
    path = tmp_path / "a"
    folder(path, [of for of in values if of], left_out=cut)
    result = checked(path)
    assert result.findings == []
    assert result.unchecked["beginning"] > 0
    assert set(result.begins.values()) == {5}


def test_without_the_definition_the_chain_is_checked(tmp_path: Path) -> None:
    """Deciding again needs the version: without it that is said, and a changed byte is found all the same."""
    made = honest(runs=4)
    result = checked(kcat(tmp_path / "log", made.partitions), {})
    assert (result.whole, result.again, result.unchecked["spec"]) == (True, 0, 4)
    partition, offset = next(place for place in made.order if place[1] < len(made.partitions[place[0]]) - 3)
    assert not checked(kcat(tmp_path / "log", changed(made.partitions, partition, offset, 60, 1)), {}).whole


def test_a_definition_that_was_changed_is_found(run_bin: Path) -> None:
    """A definition is what its digest names: one of which a byte was changed decides nothing, and is a finding."""
    data = run_bin.read_bytes()
    at = data.rindex(b"go on?")
    run_bin.write_bytes(data[:at] + b"go up?" + data[at + 6 :])
    result = foldflow("verify", "--from", str(run_bin), "--processes", "1")
    assert result.exit_code == 1, result.output
    assert "isn't the one that its digest" in result.output


def test_recent_runs_are_chosen_by_their_records_times(tmp_path: Path) -> None:
    """Given a time, the runs that have a record since then are checked, whole; the others are not looked at."""
    made = honest(runs=6)
    source = archive(folder(tmp_path / "a", made.partitions))
    longest = max(map(len, made.partitions))
    recent = verify.runs_since(source, 1_700_000_000_000 + (longest - 3) * 1000)
    partition = next(index for index, of in enumerate(made.partitions) if len(of) == longest)
    late = {codec.decode(value, Decision).run_id.encode() for value in made.partitions[partition][longest - 3 :]}
    assert recent >= late
    assert len(recent) < 6
    result = checked(source, only=recent)
    assert (result.whole, result.runs) == (True, len(recent))
    assert result.decisions == sum(event.decision.run_id.encode() in recent for event in made.accepted)


# --- The command ---


def foldflow(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(arguments), list(arguments))


@pytest.fixture
def run_bin(tmp_path: Path) -> Path:
    """Return a file of kcat with decisions and specs."""
    specs = [codec.encode(WorkflowRegistered(spec.name, spec.digest, spec.canonical, current=True)) for spec in (SPEC, RICH)]
    return kcat(tmp_path / "run.bin", honest(runs=4).partitions, specs)


def test_the_command_says_that_an_archive_is_whole(run_bin: Path) -> None:
    """Definitions come from the same file; one run, named by its request or the beginning of its id, or all of them."""
    result = foldflow("verify", "--from", str(run_bin), "--processes", "1")
    assert result.exit_code == 0, result.output
    assert "4 runs" in result.output
    assert "✓ whole" in result.output
    told = json.loads(foldflow("verify", "request 1", "--from", str(run_bin), "--json").output)
    assert (told["whole"], told["runs"], told["findings"]) == (True, 1, [])
    assert told["decided_again"] == told["decisions"] > 1
    assert foldflow("verify", ids.run_id("request 1")[:9], "--from", str(run_bin)).exit_code == 0
    assert foldflow("verify", "request 99", "--from", str(run_bin)).exit_code == 2


def test_the_command_names_the_record_that_was_changed(run_bin: Path) -> None:
    """Exit code 1, partition and offset, what differs, and the probable cause."""
    data = run_bin.read_bytes()
    at = data.index(b'"ok":true')
    run_bin.write_bytes(data[:at] + b'"ok":tru3' + data[at + 9 :])
    result = foldflow("verify", "--from", str(run_bin), "--processes", "1")
    assert result.exit_code == 1, result.output
    assert "partition" in result.output
    assert "cause: a byte of it was changed" in result.output
    (finding, *_) = json.loads(foldflow("verify", "--from", str(run_bin), "--processes", "1", "--json").output)["findings"]
    assert {"partition", "offset", "run_id", "seq", "kind", "cause"} <= set(finding)


def test_the_command_says_what_it_couldn_t_check(tmp_path: Path) -> None:
    """Exit code 3 without the definition, 0 with it from a file."""
    path = kcat(tmp_path / "log", logs(1, 2, 0.0).partitions)
    alone = foldflow("verify", "--from", str(path), "--processes", "1")
    assert (alone.exit_code, "--workflows" in alone.output) == (3, True), alone.output
    data = json.loads(SPEC.canonical)
    (tmp_path / "report.yaml").write_text(json.dumps(data | {"steps": {step.pop("name"): step for step in data["steps"]}}))
    given = foldflow("verify", "--from", str(path), "--processes", "1", "--workflows", str(tmp_path / "report.yaml"))
    assert given.exit_code == 0, given.output


def test_the_command_refuses_what_it_can_t_use(tmp_path: Path) -> None:
    """Exit code 2 for no choice, two of them, no archive, a file of something else."""
    (tmp_path / "x").write_text("no archive at all")
    (tmp_path / "empty").touch()
    for arguments in (
        (),
        ("r", "--all"),
        ("--from", str(tmp_path / "none")),
        ("--from", str(tmp_path / "x")),
        ("--from", str(tmp_path / "empty")),
        ("--from", str(tmp_path)),
        ("--since", "soon"),
    ):
        assert foldflow("verify", *arguments).exit_code == 2, arguments


def test_a_file_of_the_console_consumer_is_read_to_the_byte(tmp_path: Path) -> None:
    """What `Bytes` writes of a value is undone; a key in front of it does no harm."""
    made, path = honest(runs=3), tmp_path / "run.txt"

    def escaped(value: bytes) -> str:
        return "".join(chr(each) if 32 <= each < 127 and each != 92 else f"\\x{each:02X}" for each in value)

    lines = [
        f"Partition:{partition}\tOffset:{offset}\tkey\t{escaped(value or b'')}"
        for partition, of in enumerate(made.partitions)
        for offset, value in enumerate(of)
    ]
    path.write_text("\n".join([*lines, "Partition:0\tOffset:99999\tnull", ""]))
    source = archive(path)
    for partition, span in source.spans().items():
        assert [each.value for each in source.records(partition, span)][: len(made.partitions[partition])] == made.partitions[
            partition
        ]
    assert [each.kind for each in checked(path).findings] == ["unreadable"]


# --- What stands beside the values ---


def last_ones(made: Logs) -> list[tuple[int, int]]:
    """Return the place of each run's last decision."""
    return [(partition, mine[-1]) for partition, values in enumerate(made.partitions) for mine in runs_of(values).values()]


def test_a_byte_of_a_last_decision_is_found_by_the_hash_in_its_header(tmp_path: Path) -> None:
    """Nothing is built on a run's last decision: any byte of it that was changed shows by what its header names."""
    made = honest()
    for partition, offset in last_ones(made):
        values = [list(of) for of in made.partitions]
        decision = codec.decode(values[partition][offset], Decision)
        values[partition][offset] = codec.encode(replace(decision, at=decision.at + 1))
        found = checked(kcat(tmp_path / "log", values, claims=made.partitions))
        assert (partition, offset) in {(each.partition, each.offset) for each in found.findings if each.kind == "header"}


def test_where_no_header_is_kept_that_is_said(tmp_path: Path) -> None:
    """Given values alone; then nothing wrong is found, and not all is known: what each run's last decision was."""
    made, bare = honest(), tmp_path / "bare"
    bare.write_bytes(as_kcat_values(rows_of(made.partitions)))
    found = checked(bare)
    assert found.whole
    assert dict(found.unchecked) == {"end": found.runs}
    assert not checked(kcat(tmp_path / "log", made.partitions)).unchecked


def with_columns(path: Path, made: Logs) -> Path:
    """Add the columns of an export to an archive's files."""
    for file in folder(path, made.partitions).rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        told = [export_files.told(codec.decode(value, Decision)) for value in table["value"].to_pylist()]
        for name, column in zip(export_files.TOLD, zip(*told, strict=True), strict=True):
            table = table.append_column(name, pa.array(column))
        pq.write_table(table, file, write_page_checksum=True, row_group_size=10_000)
    return path


def test_a_column_that_says_something_else_than_its_record_is_found(tmp_path: Path) -> None:
    """Columns are what people ask: a rewritten one is named with its record; fields that a later version added are none."""
    made = honest()
    for name, change in {
        "run_id": lambda text: text[::-1],
        "seq": lambda number: number + 1,
        "input_type": lambda text: text + "x",
        "input": lambda text: text.replace('"type":"', '"type":"x', 1),
        "effects": lambda text: text[:-1] + (',{"type":"RunPaid"}]' if len(text) > 2 else '{"type":"RunPaid"}]'),
    }.items():
        path = tmp_path / name
        file = min(with_columns(path, made).rglob("*.parquet"))
        assert not checked(path).findings
        table = pq.read_table(file, partitioning=None)
        column = table[name].to_pylist()
        column[0] = change(column[0])
        index = table.schema.get_field_index(name)
        pq.write_table(table.set_column(index, name, pa.array(column)), file)
        (found,) = checked(path).findings
        assert (found.kind, found.offset) == ("column", table["offset"][0].as_py())
        assert f"its column `{name}` says" in found.problem


def test_a_column_of_an_older_version_says_the_same() -> None:
    """Given a field that a later version has added, then it is missing in old columns where it says nothing, and only there."""
    decision = codec.decode(next(value for of in honest().partitions for value in of), Decision)
    *before, told_input, effects = export_files.told(decision)
    for name, value in json.loads(told_input).items():
        older = json.dumps({key: each for key, each in json.loads(told_input).items() if key != name})
        assert (export_files.differing(decision, (*before, older, effects)) is None) == (not value), name


def test_a_flipped_bit_in_any_column_is_found(tmp_path: Path) -> None:
    """Also in one that nothing else vouches for, as Kafka's time: each page has a checksum."""
    made = honest()
    file = min(with_columns(tmp_path, made).rglob("*.parquet"))
    whole = file.read_bytes()
    meta = pq.read_metadata(file).row_group(0)
    for number in range(meta.num_columns):
        chunk = meta.column(number)
        data = bytearray(whole)
        begins = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
        data[begins + chunk.total_compressed_size - 2] ^= 4
        file.write_bytes(data)
        assert not checked(tmp_path).whole, chunk.path_in_schema
