import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner

from events import codec, ids, topics
from events.as_json import payload
from events.decisions import DeadLetter, DeadLetterSettled
from events.errors import NotDecodableError
from events.topics import MAX_VALUE_BYTES
from infra.cli import deadletters, letters
from infra.cli.letters import Entry, NotRedrivableError
from infra.cli.main import command_line
from infra.cli.terminal import clock
from streams.envelope import CUT, REDRIVEN_FROM, Incoming, ReadHeaders, dead_letter, redriven_from
from streams.processors.intake import Intake
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec

SETTINGS = Settings()
GREET = WorkflowSpec.model_validate({"name": "greet", "steps": {"hello": {"transform": "='Hello'"}}})
LETTER = DeadLetter("foldflow.requests", 3, 17, 1_000, "unknown_workflow", "there is none", "q", None, b"k", b"{}", {"a": None})


class OneWorkflow:
    """A registry that knows `greet`."""

    def get(self, version: str) -> WorkflowSpec | None:
        """Return a version."""
        return GREET if version == GREET.digest else None

    def newest(self, workflow: str) -> WorkflowSpec | None:
        """Return the newest version."""
        return GREET if workflow == GREET.name else None

    def names(self) -> list[str]:
        """Return all names."""
        return [GREET.name]

    def refresh(self) -> None:
        """Look for new versions."""


def settled(letter: DeadLetter, action: str, **changes: Any) -> DeadLetterSettled:
    return replace(DeadLetterSettled(letter.topic, letter.partition, letter.offset, action, 5, "ann", ""), **changes)


def stored(value: bytes | None, offset: int = 0, headers: dict[str, bytes | None] | None = None) -> Incoming:
    return Incoming("foldflow.deadletter", 1, offset, 2_000, b"", value, headers or {})


def read(*values: bytes | None) -> dict[letters.Place, Entry]:
    found: dict[letters.Place, Entry] = {}
    for offset, value in enumerate(values):
        letters.take(found, stored(value, offset))
    return found


def entry(**changes: Any) -> Entry:
    return Entry(replace(LETTER, **changes, value=None), 2_000, (1, 0), 2)


def test_the_last_settlement_says_how_a_letter_stands_and_all_are_its_history() -> None:
    """A repeated letter counts once; what isn't ours or nobody can do is passed over; the value isn't kept in memory."""
    (found,) = read(
        codec.encode(LETTER),
        b"?",
        None,
        codec.encode(replace(LETTER, reason="other")),
        codec.encode(settled(LETTER, "redriven")),
        codec.encode(settled(LETTER, "vanished")),
        codec.encode(settled(replace(LETTER, offset=99), "discarded")),
        codec.encode(settled(LETTER, "discarded")),
    ).values()
    assert (found.status, [each.action for each in found.settled]) == ("discarded", ["redriven", "discarded"])
    assert (found.letter.reason, found.letter.value, found.size, found.at, found.stands) == (
        "unknown_workflow",
        None,
        2,
        2_000,
        (1, 0),
    )


def test_a_message_goes_back_as_it_was_by_its_key() -> None:
    """Bytes, key and headers are the original ones, a header says where it was, and no partition is named."""
    record = letters.again(topics.REQUESTS, replace(LETTER, headers={"a": None, REDRIVEN_FROM: b"older", "b": b"\xff"}))
    assert (record.topic, record.key, record.value, record.partition) == (topics.REQUESTS, b"k", b"{}", None)
    assert record.headers == [("a", None), ("b", b"\xff"), (REDRIVEN_FROM, b"foldflow.requests/3/17")]
    assert letters.again(topics.REQUESTS, replace(LETTER, key=None)).key is None


@pytest.mark.parametrize("topic", ["foldflow.decisions", "foldflow.finished", "foldflow.deadletter", "payments", "requests", ""])
def test_only_what_processors_take_work_from_is_written_to(topic: str) -> None:
    """History, indexes and foreign topics are refused, whatever a dead letter says that anybody may have written."""
    with pytest.raises(NotRedrivableError, match="ever put on"):
        letters.source_topic(SETTINGS, entry(topic=topic))
    assert letters.source_topic(SETTINGS, entry()) is topics.REQUESTS


@pytest.mark.parametrize(
    ("record", "cut"),
    [
        ({"value": b"v" * (MAX_VALUE_BYTES + 1024)}, "value"),
        ({"key": b"\xff" * (8 * 1024 * 1024)}, "key"),
        ({"headers": {f"h{i}": b"x" * 1000 for i in range(9000)}}, "headers"),
        ({"value": b"v" * (9 << 20), "key": b"k" * (9 << 20), "headers": {"h": b"x" * (9 << 20)}}, "value,key,headers"),
    ],
)
def test_whatever_is_dead_lettered_fits_a_record_and_what_was_cut_is_not_redriven(record: dict[str, Any], cut: str) -> None:
    """A dead letter is never too large to be written, says what it doesn't hold, and that is refused with what to do instead."""
    whole = Incoming("foldflow.requests", 0, 1, 2, **{"key": None, "value": None, **record})
    text = (whole.key or b"").decode("utf-8", "replace")
    made = dead_letter(whole, "not_decodable", f"nothing called {text}", "test", run_id=text, request_id=text)
    assert made.value is not None
    assert len(made.value) + sum(len(name) + len(value or b"") for name, value in made.headers) < MAX_VALUE_BYTES + 512 * 1024
    found: dict[letters.Place, Entry] = {}
    letters.take(found, stored(made.value, 0, dict(made.headers)))
    (one,) = found.values()
    assert one.cut == cut
    with pytest.raises(NotRedrivableError, match="only a part"):
        letters.source_topic(SETTINGS, one)


@pytest.mark.parametrize(("headers", "lost"), [({}, True), ({"a": b"1", "\udcff\udcfe": b"x"}, False)], ids=["lost", "odd"])
def test_headers_whose_names_are_no_text_are_said_to_be_cut(headers: dict[str, bytes | None], lost: bool) -> None:
    """A letter can't hold them, whether the client has lost all of a message's headers or read such a name."""
    record = Incoming("foldflow.requests", 0, 1, 2, b"k", b"v", ReadHeaders(lambda: None if lost else [*headers.items()]))
    made = dead_letter(record, "r", "d", "test")
    letter = codec.decode(made.value, DeadLetter)
    assert dict(made.headers)[CUT] == b"headers"
    assert (letter.value, [*letter.headers]) == (b"v", [name for name in headers if name == "a"])
    assert "not all headers are kept" in letter.detail


def test_what_fits_is_kept_whole() -> None:
    """A message within the limits is kept byte for byte, without the mark."""
    record = Incoming("t", 0, 1, 2, b"\xff" * 60_000, b"v" * (MAX_VALUE_BYTES - 256 * 1024), {"a": None, "b": b"\0" * 60_000})
    made = dead_letter(record, "r", "d", "test")
    letter = codec.decode(made.value, DeadLetter)
    assert (letter.key, letter.value, letter.headers) == (record.key, record.value, record.headers)
    assert CUT not in dict(made.headers)


def test_a_reader_of_letters_refuses_settlements_as_what_it_cannot_read() -> None:
    """Who knows letters only gets the error for foreign bytes, not another letter."""
    with pytest.raises(NotDecodableError):
        codec.decode(codec.encode(settled(LETTER, "redriven")), DeadLetter)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (None, "none"),
        (b'{"a": 1}', "json"),
        (codec.encode(LETTER), "DeadLetter"),
        (codec.encode(LETTER)[:20], "bytes"),
        (b"\xff\xfe", "bytes"),
        (b"[" * 100_000, "bytes"),
        (b"NaN", "bytes"),
    ],
)
def test_values_are_shown_as_what_they_are(value: bytes | None, form: str) -> None:
    """JSON and our Avro are decoded, all else is bytes; nothing raises."""
    found, shown = deadletters.decoded(value)
    assert found == form
    json.dumps(shown)


def test_hexdump() -> None:
    """Sixteen bytes a line, with what is printable of them."""
    assert list(deadletters.hexdump(b"\0ab" * 6)) == [
        "00000000  00 61 62 00 61 62 00 61 62 00 61 62 00 61 62 00  .ab.ab.ab.ab.ab.",
        "00000010  61 62                                            ab",
    ]


def test_one_letter_is_named_by_its_place_with_or_without_prefix_or_by_its_end() -> None:
    """The exact place wins; an end that several have is refused."""
    entries = [entry(), entry(partition=1, offset=17), entry(topic="foldflow.inbox", partition=3, offset=8)]
    assert deadletters._found(entries, SETTINGS, "requests/3/17") is entries[0]
    assert deadletters._found(entries, SETTINGS, "foldflow.requests/3/17") is entries[0]
    assert deadletters._found(entries, SETTINGS, "8") is entries[2]
    for wrong in ("17", "7", "requests/3"):
        with pytest.raises(Exception, match="2"):
            deadletters._found(entries, SETTINGS, wrong)


def test_filters() -> None:
    """Reason, topic (with or without prefix) and age narrow the choice together; a wrong age is a wrong option."""
    entries = [entry(), entry(reason="invalid_input"), replace(entry(topic="foldflow.inbox"), at=4_000_000_000_000)]
    assert deadletters._filtered(SETTINGS, entries, "unknown_workflow", "requests", "") == entries[:1]
    assert deadletters._filtered(SETTINGS, entries, "", "foldflow.inbox", "") == entries[2:]
    assert deadletters._filtered(SETTINGS, entries, "", "", "2h") == entries[2:]
    with pytest.raises(Exception, match="2"):
        deadletters._filtered(SETTINGS, entries, "", "", "soon")


def test_a_request_without_an_id_is_one_run_however_often_it_is_redriven() -> None:
    """Also when it became a dead letter once more in between: where it stood first names it. Another topic's header doesn't."""

    def run(letter: DeadLetter, offset: int) -> bytes | None:
        record = letters.again(topics.REQUESTS, letter)
        read_again = Incoming(letter.topic, 5, offset, 1, record.key, record.value, dict(record.headers))
        (said,) = Intake(OneWorkflow(), b"t" * 16).check(read_again)
        assert said.topic is topics.INBOX
        return said.key

    letter = replace(LETTER, value=b'{"workflow": "greet", "input": {}}')
    once = dict(letters.again(topics.REQUESTS, letter).headers)
    later = replace(letter, partition=5, offset=100, headers=once)
    assert run(letter, 100) == run(letter, 200) == run(later, 300) == ids.run_id(f"{UUID(bytes=b't' * 16)}/3/17").encode()
    for forged in (b"foldflow.inbox/3/17", b"foldflow.requests/3/-1", b"foldflow.requests/3/017", b"\xff", None):
        assert redriven_from(letter.topic, {REDRIVEN_FROM: forged}) is None


def test_what_no_calendar_or_reader_can_take_is_shown_all_the_same() -> None:
    """Times beyond the year 9999 and JSON beyond the recursion limit: anybody writes them, and whoever looks at them goes on."""
    deep = "[" * 100_000 + "]" * 100_000
    assert {clock(ms) for ms in ((1 << 63) - 1, -(1 << 63), 1 << 48)} == {"????-??-?? ??:??:??.???"}
    assert len(clock(0)) == len("????-??-?? ??:??:??.???")
    assert payload(deep) == deep


@pytest.mark.parametrize("arguments", [["list", "--open", "--all"], ["show"], ["redrive", "--nonsense"]])
def test_wrong_options_end_with_2(arguments: list[str]) -> None:
    """Before anything is asked of Kafka."""
    command = ["deadletters", *arguments]
    assert CliRunner().invoke(command_line(command), command).exit_code == 2
