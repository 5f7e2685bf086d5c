import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from streams.workflow.expressions import EvaluationError, to_json
from streams.workflow.spec import WorkflowSpec, digest, from_canonical
from streams.workflow.times import milliseconds

ECHO = {"tool": {"name": "echo"}}


def spec(steps: object, **more: object) -> WorkflowSpec:
    """Return a definition."""
    return WorkflowSpec.model_validate({"name": "w", "steps": steps, **more})


def test_two_spellings_are_one_version() -> None:
    """Defaults written out, keys in another order, durations in other units, steps as a list: the same digest."""
    short = spec({"a": ECHO, "b": {"tool": {"name": "echo", "arguments": {"x": 1, "y": 2}}, "needs": ["a"], "timeout": "90s"}})
    long = spec(
        [
            {"on_failure": "fail", "name": "a", "timeout": 60_000, **ECHO, "retry": {"attempts": 3, "initial": "1s"}},
            {"name": "b", "needs": ("a",), "timeout": "1.5m", "tool": {"arguments": {"y": 2, "x": 1}, "name": "echo"}},
        ],
        description="",
        output=None,
    )
    assert short.digest == long.digest
    assert short == long


@pytest.mark.parametrize(
    "other",
    [
        {"a": {**ECHO, "timeout": "61s"}},
        {"b": ECHO},
        {"a": {"tool": {"name": "Echo"}}},
        {"a": {**ECHO, "when": "true"}},
        {"a": {**ECHO, "on_failure": "continue"}},
    ],
)
def test_another_meaning_is_another_version(other: object) -> None:
    """What changes what a run does changes the digest."""
    assert spec({"a": ECHO}).digest != spec(other).digest


def test_the_order_of_steps_counts() -> None:
    """Steps in another order are requested in another order, so that is another version."""
    assert spec({"a": ECHO, "b": ECHO}).digest != spec({"b": ECHO, "a": ECHO}).digest


def test_the_digest_is_fixed_for_all_time() -> None:
    """The digest of a definition never changes: runs in old logs name it."""
    assert spec({"a": ECHO}).canonical == '{"name":"w","steps":[{"name":"a","tool":{"name":"echo"}}]}'
    assert spec({"a": ECHO}).digest == digest('{"name":"w","steps":[{"name":"a","tool":{"name":"echo"}}]}')
    assert spec({"a": ECHO}).digest == "e503eafc09f3f8b59d8b58da432f8ee03447125e00b7f5b66398c56e39066806"


def test_the_canonical_form_reads_back() -> None:
    """The canonical form gives the same definition and the same canonical form."""
    full = {
        "a": {
            "llm": {"prompt": "{{ input.x }}", "schema": {"type": "object"}, "stop": ["\n"], "temperature": 0.5},
            "timeout": "2h",
        },
        "b": {
            "transform": {"=not": "=steps.a.output", "n": 1.5},
            "needs": ["a"],
            "when": "input.x > 1",
            "retry": {"factor": 1.5},
        },
    }
    one = spec(full, input={"type": "object"}, output={"x": "=steps.b.output"}, description="é")
    assert from_canonical(one.canonical) == one
    assert from_canonical(one.canonical).canonical == one.canonical


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ({"first": ECHO, "b": {**ECHO, "needs": ["frist"]}}, "there is no step `frist`; did you mean `first`?"),
        ({"a": {**ECHO, "needs": ["b"]}, "b": ECHO}, "`b` stands further down; a step can only need earlier ones"),
        ({"a": {**ECHO, "needs": ["a"]}}, "steps.a.needs: a step can't need itself"),
        ({"a": {**ECHO, "needs": ["b"]}, "b": {**ECHO, "needs": ["a"]}}, "these steps need each other: a → b → a"),
        (
            {"x": ECHO, "a": {**ECHO, "needs": ["x", "b"]}, "b": {**ECHO, "needs": ["c"]}, "c": {**ECHO, "needs": ["x", "a"]}},
            "steps.a.needs: these steps need each other: a → b → c → a",
        ),
        ({"a": ECHO, "b": {"transform": "=steps.a.output"}}, "steps.b: names steps.a but doesn't need it; add it to `needs`"),
        ({"alpha": ECHO, "b": {"transform": "=steps.alhpa.output", "needs": ["alpha"]}}, "did you mean `alpha`?"),
        ({"a": {"llm": {"prompt": "{{ steps.b.output }}"}}}, "there is no step `b`"),
        ({"a": {"transform": "=inptu.x"}}, "did you mean `input`?"),
        ({"a": {"transform": "=1 +"}}, "steps.a: `1 +` is no CEL expression"),
        ({"a": {"llm": {"prompt": "{{ x"}}}, "steps.a: template, line 1"),
        ({"a": {}}, "this one has none of them"),
        ({"a": {**ECHO, "transform": 1}}, "this one has tool and transform"),
        ({"a": {**ECHO, "timeout": "5 parsecs"}}, "`5 parsecs` is no duration; write 500ms, 60s, 5m, 2h or 3d"),
        ({"a": {**ECHO, "timeuot": "5s"}}, "timeuot"),
        ({"a": {"llm": {"prompt": "x", "schema": {"type": "objekt"}}}}, "steps.a.llm.schema: no JSON Schema"),
        ([{"name": "a", **ECHO}, {"name": "a", **ECHO}], "there are two steps of this name"),
        ({"a b": ECHO}, "pattern"),
        ({}, "at least 1 item"),
    ],
)
def test_a_wrong_definition_says_where_and_how_to_mend_it(steps: object, says: str) -> None:
    """Each mistake is refused with its place and, for a misspelt name, the nearest right one."""
    with pytest.raises(ValidationError) as caught:
        spec(steps)
    assert says in str(caught.value)


def test_a_wrong_output_and_input_are_refused() -> None:
    """The run's output names steps, and its input is a JSON Schema."""
    with pytest.raises(ValidationError, match="output: there is no step `aa`; did you mean `a`"):
        spec({"a": ECHO}, output="=steps.aa.output")
    with pytest.raises(ValidationError, match="input: no JSON Schema"):
        spec({"a": ECHO}, input={"type": "objekt"})


@pytest.mark.parametrize(
    "step",
    [
        {"tool": {"name": "\ud800"}},
        {"llm": {"prompt": "x", "model": "\ud800"}},
        {"transform": 1, "when": "'\ud800' == 'a'"},
        {"transform": "='\ud800'"},
        {"transform": float("nan")},
        {"transform": [float("inf")]},
        {**ECHO, "timeout": 10**30},
        {**ECHO, "timeout": "9" * 400 + "d"},
        {**ECHO, "retry": {"initial": 10**400}},
        {"llm": {"prompt": "x", "schema": {"default": float("nan")}}},
    ],
    ids=lambda step: repr(step)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_what_a_decision_could_not_say_is_refused(step: object) -> None:
    """A definition whose decisions could not be written (no UTF-8, no JSON, no 64 bits) is refused like any other mistake."""
    with pytest.raises(ValidationError):
        spec({"a": step})


@pytest.mark.parametrize(
    ("text", "ms"), [("500ms", 500), ("60s", 60_000), ("1.5m", 90_000), ("2h", 7_200_000), ("3d", 259_200_000), (" 1s ", 1000)]
)
def test_durations(text: str, ms: int) -> None:
    """A duration is a number and a unit, in milliseconds."""
    assert milliseconds(text) == ms


@pytest.mark.parametrize("text", ["0s", "0", "-1s", "1", "s", "1 s", ""])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """Zero, negative and unitless numbers are no durations."""
    with pytest.raises(ValidationError):
        spec({"a": {**ECHO, "timeout": text}})


def test_an_input_gets_its_defaults_and_is_checked() -> None:
    """A run's input is completed with defaults, written canonically, and its problems are named by place."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "d": {"default": 5}}, "required": ["n"]}
    one = spec({"a": ECHO}, input=schema)
    assert one.check_input('{ "n": 1 }') == ('{"d":5,"n":1}', [])
    assert one.check_input('{"n": "x", "d": 2}') == ('{"d":2,"n":"x"}', ["input.n: 'x' is not of type 'integer'"])
    assert one.check_input("{}")[1] == ["input: 'n' is a required property"]
    with pytest.raises(EvaluationError):
        one.check_input("nonsense")


@settings(deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8))
def test_any_value_as_a_definition_is_read_or_refused(value: object) -> None:
    """Whatever stands in a definition's place is a definition or a ValidationError."""
    for data in (
        value,
        {"name": "w", "steps": value},
        {"name": "w", "steps": {"a": value}},
        {"name": "w", "steps": {"a": {"transform": value}}},
    ):
        try:
            to_json(WorkflowSpec.model_validate(data).canonical)
        except ValidationError:
            continue
