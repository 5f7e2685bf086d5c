"""The pure part: what is a reference, and what a text with references in it means."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.workflow import payloads
from streams.workflow.expressions import MAX_DEPTH, EvaluationError, from_json, to_json
from streams.workflow.payloads import (
    INLINE_BYTES,
    MAX_PAYLOAD_BYTES,
    Memory,
    NoPayloads,
    PayloadDamagedError,
    PayloadMissingError,
    PayloadTooDeepError,
    PayloadTooLargeError,
    inlined,
    is_reference,
    reference,
    references,
    resolve,
)

DIGEST = "0" * 64
LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
FAKES = st.sampled_from(
    [
        {"$payload": "0" * 63, "bytes": 5},
        {"$payload": "0" * 65, "bytes": 5},
        {"$payload": "0" * 64 + "\n", "bytes": 5},
        {"$payload": "A" * 64, "bytes": 5},
        {"$payload": "0" * 64},
        {"$payload": "0" * 64, "bytes": 5, "more": None},
        {"$payload": "0" * 64, "bytes": "5"},
        {"$payload": "0" * 64, "bytes": True},
        {"$payload": "0" * 64, "bytes": 5.0},
        {"$payload": "0" * 64, "bytes": 0},
        {"$payload": "0" * 64, "bytes": -1},
        {"$payload": None, "bytes": 5},
        {"$payload": {}, "bytes": []},
        "$payload",
    ]
)
KEYS = st.text() | st.sampled_from(["$payload", "bytes"])
JSON = st.recursive(
    LEAVES | FAKES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=15,
)


def moved(value: Any, kept: Memory, draw: Any, deep: int = 0) -> Any:
    """Return a value with some of its parts in payloads, some of which have parts in payloads."""
    if isinstance(value, dict):
        value = {key: moved(each, kept, draw, deep + 1) for key, each in value.items()}
    elif isinstance(value, list):
        value = [moved(each, kept, draw, deep + 1) for each in value]
    return from_json(kept.put(to_json(value))) if deep < 5 and draw(st.booleans()) else value


@given(JSON)
def test_what_was_put_away_comes_back(value: Any) -> None:
    """A text and the reference to it have the same value, whatever in it only looks like a reference."""
    kept = Memory()
    text = to_json(value)
    assert to_json(resolve(inlined(text, kept), kept)) == to_json(resolve(kept.put(text), kept)) == text


@given(JSON, st.data())
@settings(max_examples=200)
def test_parts_of_it_come_back_to_their_places(value: Any, data: st.DataObject) -> None:
    """References stand anywhere, in payloads too, and the value is the same as without them."""
    kept = Memory()
    whole = moved(value, kept, data.draw)
    assert to_json(resolve(to_json(whole), kept)) == to_json(value)
    assert set(references(whole)) == set(references(to_json(whole))) <= set(kept.texts)


@given(FAKES | LEAVES)
def test_what_only_looks_like_a_reference_is_data(value: Any) -> None:
    """It is returned as it is, and nothing is looked up for it."""
    text = to_json({"a": [value], "$payload": value})
    assert not is_reference(value)
    assert references(text) == ()
    assert to_json(resolve(text, NoPayloads())) == text


def test_a_reference_is_canonical_json_of_two_keys() -> None:
    """Anybody can make one: BLAKE2b-256 and size of the UTF-8 bytes."""
    text = '"é"'
    assert reference(text) == '{"$payload":"5f1287209b4b887db0fb42eacec2e0dfb7baee9ff1a068ed5ee51f0703e41058","bytes":4}'
    assert is_reference(json.loads(reference(text)))
    assert to_json(json.loads(reference(text))) == reference(text)


def test_references_are_told_once_and_not_those_in_payloads() -> None:
    """In the order in which they stand, whether asked of a text or of its value."""
    kept = Memory()
    inner = from_json(kept.put('"inner"'))
    outer = from_json(kept.put(to_json([inner])))
    text = to_json({"a": inner, "b": [outer, inner]})
    assert set(references(text)) == {inner["$payload"], outer["$payload"]} == set(references(from_json(text)))
    assert len(references(text)) == 2
    assert references(to_json(outer)) == (outer["$payload"],)
    assert references('"$payload"') == references(None) == ()


def test_a_text_stands_in_an_event_up_to_256_kib() -> None:
    """Measured in UTF-8 bytes, not in characters."""
    kept = Memory()
    fits = '"' + "x" * (INLINE_BYTES - 2) + '"'
    assert inlined(fits, kept) is fits
    assert kept.texts == {}
    assert is_reference(from_json(inlined(f"[{fits}]", kept)))
    assert is_reference(from_json(inlined('"' + "é" * (INLINE_BYTES // 2) + '"', kept)))


def test_no_payload_is_larger_than_64_mib() -> None:
    """It is refused with its size, before it is kept."""
    kept = Memory()
    with pytest.raises(PayloadTooLargeError, match="67,108,865 bytes is too large; the limit is 67,108,864") as caught:
        inlined('"' + "x" * (MAX_PAYLOAD_BYTES - 1) + '"', kept)
    assert (caught.value.size, caught.value.limit) == (MAX_PAYLOAD_BYTES + 1, MAX_PAYLOAD_BYTES)
    assert kept.texts == {}


def test_without_a_store_what_is_large_is_too_large() -> None:
    """And every reference is missing."""
    with pytest.raises(PayloadTooLargeError, match="the limit is 262,144"):
        inlined('"' + "x" * INLINE_BYTES + '"', NoPayloads())
    with pytest.raises(PayloadMissingError):
        resolve(reference("1"), NoPayloads())


def test_a_missing_payload_is_told_by_its_digest() -> None:
    """However deep its reference stands."""
    with pytest.raises(PayloadMissingError, match=DIGEST) as caught:
        resolve(to_json({"a": [{"b": {"$payload": DIGEST, "bytes": 5}}]}), Memory())
    assert caught.value.digest == DIGEST


def test_other_content_under_a_digest_is_damage() -> None:
    """Of the same size or not."""
    kept = Memory()
    asked = kept.put('"abc"')
    (digest,) = kept.texts
    for other in ('"abd"', '"abcd"'):
        kept.texts[digest] = other
        with pytest.raises(PayloadDamagedError) as caught:
            resolve(asked, kept)
        assert caught.value.digest == digest


def test_a_reference_with_a_wrong_size_is_refused() -> None:
    """Else a small number could stand for a large payload."""
    kept = Memory()
    asked = from_json(kept.put('"abc"'))
    with pytest.raises(PayloadDamagedError, match="has 5 bytes, its reference says 4"):
        resolve(to_json(asked | {"bytes": 4}), kept)


def test_a_payload_that_is_not_json_is_refused() -> None:
    """Whoever stored it wrote nonsense; the error is that of any nonsense."""
    kept = Memory()
    with pytest.raises(EvaluationError):
        resolve(kept.put("nonsense"), kept)


@pytest.mark.parametrize("wrap", [lambda found: found, lambda found: [found]], ids=["alone", "in a list"])
def test_payloads_refer_to_payloads_at_most_eight_deep(wrap: Any) -> None:
    """Eight come back; of nine none is returned."""
    kept = Memory()
    found, expected = kept.put("1"), 1
    for _ in range(7):
        found, expected = kept.put(to_json(wrap(from_json(found)))), wrap(expected)
    assert resolve(found, kept) == expected
    assert resolve(to_json([from_json(found)]), kept) == [expected]  # what stands in no payload doesn't count
    with pytest.raises(PayloadTooDeepError, match="more than 8"):
        resolve(kept.put(to_json(wrap(from_json(found)))), kept)


def test_a_value_is_nested_no_deeper_with_payloads_than_without() -> None:
    """Else it could be resolved and never be written again."""
    kept = Memory()
    half = "[" * (MAX_DEPTH // 2)
    inner = kept.put(half + "1" + "]" * len(half))
    assert to_json(resolve(half + inner + "]" * len(half), kept)).count("[") == MAX_DEPTH
    with pytest.raises(PayloadTooDeepError, match="more than 200"):
        resolve("[" + half + inner + "]" * len(half) + "]", kept)


def test_a_small_text_cannot_mean_a_value_without_end() -> None:
    """What is referred to often counts often: eight payloads that name each other a hundred times are refused early."""
    kept = Memory()
    found = kept.put(json.dumps("x" * 1000))
    for _ in range(7):
        found = kept.put(to_json([from_json(found)] * 100))
    with pytest.raises(PayloadTooLargeError):
        resolve(found, kept)


def test_each_place_has_a_value_of_its_own() -> None:
    """A tool that changes one of its arguments doesn't change another."""
    kept = Memory()
    inner = from_json(kept.put('{"n":1}'))
    first, second = resolve(to_json([inner, inner]), kept)
    first["n"] = 2
    assert second == {"n": 1}


def test_a_text_without_references_is_only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is looked at: most texts have none."""
    monkeypatch.setattr(payloads, "is_reference", None)
    assert resolve('{"a":[1,{"payload":2}]}', NoPayloads()) == {"a": [1, {"payload": 2}]}
    with pytest.raises(TypeError):
        resolve('["$payload",[]]', NoPayloads())
