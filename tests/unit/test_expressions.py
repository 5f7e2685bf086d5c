import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.workflow.expressions import DefinitionError, EvaluationError, Expression, Scope, Value, from_json, to_json
from streams.workflow.templates import Template

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
MAP = Scope({"input": {chr(97 + i): i for i in range(12)}})

ORDER_MATTERS = (
    "input.map(k, k)",
    "input.filter(k, input[k] > 2)",
    "input.map(k, input[k]).map(v, v + 1)",
    "[input].map(m, m.map(k, k))",
    "{'x': 1, 'y': 2, 'z': 3, 'w': 4}.map(k, k)",
    "input.filter(k, k != 'b') + input.map(k, k)",
    "input.exists(k, 4 / input[k] == 1)",
    "input.all(k, 4 / input[k] > 100)",
    "input",
    "input + 1",
)


def said(source: str) -> str:
    """Return what an expression says over `MAP`, be it an error."""
    try:
        return to_json(Expression(source).evaluate(MAP))
    except EvaluationError as error:
        return f"error: {error}"


@pytest.mark.parametrize("source", ORDER_MATTERS)
def test_an_expression_says_the_same_each_time(source: str) -> None:
    """CEL's maps have a random order in each evaluation; the result (or the error) doesn't."""
    assert len({said(source) for _ in range(60)}) == 1


def test_expressions_say_the_same_in_every_process() -> None:
    """Processes with other hash seeds compute the same values."""
    program = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); from test_expressions import *; print(json.dumps(all_said()))"
    )
    path = json.dumps([*sys.path, str(__file__).rsplit("/", 1)[0]])
    results = {
        subprocess.run(
            [sys.executable, "-c", program, path], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(results) == 1


def all_said() -> list[str]:
    """Return what every expression that iterates over a map in order says (for another process)."""
    return [said(source) for source in ORDER_MATTERS if "exists" not in source and "all(" not in source]


@pytest.mark.parametrize(
    "source",
    [
        "{{ input.items }}",
        "{{ input|map('upper') }}",
        "{{ input|select }}",
        "{{ input.a.bit_length }}",
        "{{ 'a'.upper }}",
        "{{ [1]|batch(2) }}",
        "{{ ([1]|map('abs')) ~ '' }}",
        "{{ '%s'|format([1]|map('abs')) }}",
    ],
)
def test_a_template_never_shows_an_address(source: str) -> None:
    """What has no text of its own (a method, a generator) is an error or a value, never a place in this process's memory."""
    try:
        text = Template(source).render(MAP)
    except EvaluationError:
        return
    assert " at 0x" not in text


def test_a_key_named_like_a_method_is_a_key() -> None:
    """`input.items` in a template is the input's key, as it is in CEL, not a method of Python's dict."""
    scope = Scope({"input": {"items": [1, 2], "keys": 3, "get": 4, "copy": 5}})
    assert Template("{{ input.items[0] }}{{ input.keys }}{{ input.get }}{{ input.copy }}").render(scope) == "1345"
    assert Expression("input.items").evaluate(scope) == [1, 2]


@pytest.mark.timeout(20)
def test_a_template_cannot_count_for_ever() -> None:
    """`range` is bounded: a template can't hold up the orchestrator."""
    with pytest.raises(EvaluationError):
        Template("{% for i in range(10000000000) %}{% endfor %}").render(MAP)


@given(JSON)
def test_canonical_json_is_a_fixed_point(value: object) -> None:
    """Canonical JSON reads back as the same value and is written the same again, in UTF-8."""
    text = to_json(value)
    assert text.encode().decode() == text
    assert to_json(from_json(text)) == text
    assert from_json(text) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_canonical_json_does_not_know_the_order_of_keys(value: dict[str, int]) -> None:
    """The same map in another order is the same text."""
    assert to_json(dict(reversed(value.items()))) == to_json(value)


def test_lone_surrogates_are_escaped() -> None:
    """Text that UTF-8 can't say is escaped, so that every canonical text can be stored."""
    assert to_json({"a": "\ud800", "b": "é"}) == '{"a":"\\ud800","b":"\\u00e9"}'
    assert to_json({"b": "é"}) == '{"b":"é"}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), b"x", {1, 2}, object(), {"a": [float("nan")]}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    """Not a number, infinity and foreign types are no JSON values."""
    with pytest.raises(EvaluationError, match="not a JSON value"):
        to_json(value)


@pytest.mark.parametrize(
    "text", ["", "NaN", "[Infinity]", "-Infinity", "{", "[1] x", "\0", "'a'", "1" * 5000, '{"a":1e400}', "1e999"]
)
def test_what_is_no_json_is_refused(text: str) -> None:
    """A text is JSON by the standard, with numbers that this code can write again, or it is refused."""
    with pytest.raises(EvaluationError, match="not JSON"):
        from_json(text)


def deep(levels: int) -> str:
    """Return nested lists."""
    return "[" * levels + "]" * levels


def below(frames: int, text: str) -> str:
    """Say whether a text is JSON when the call stack is so many frames deeper."""
    if frames:
        return below(frames - 1, text)
    try:
        return to_json(from_json(text))
    except EvaluationError as error:
        return str(error)


@pytest.mark.parametrize("levels", [100, 500, 900, 1000, 5000, 200_000])
def test_depth_does_not_depend_on_the_call_stack(levels: int) -> None:
    """Whether deep JSON is refused is the same wherever it is read: in the orchestrator's thread, in a replay, in a test."""
    assert below(0, deep(levels)) == below(500, deep(levels))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "source", ["1" + "+1" * 50_000, "(" * 50_000 + "1" + ")" * 50_000, "-" * 100_000 + "1", "[" * 50_000 + "]" * 50_000]
)
def test_an_enormous_expression_does_not_end_the_process(source: str) -> None:
    """An expression that would exhaust the parser's stack is at worst a DefinitionError, never the end of the process."""
    program = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1])\n"
        "from streams.workflow.expressions import *\n"
        "try: Expression(sys.stdin.read())\n"
        "except DefinitionError: print('refused')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(sys.path)], input=source, text=True, capture_output=True, check=False
    )
    assert (run.returncode, run.stdout.strip() in ("", "refused")) == (0, True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("inptu.a", "`inptu` is not defined; did you mean `input`?"),
        ("step.a", "`step` is not defined; did you mean `steps`?"),
        ("order.total > 3", "`order` is not defined; an expression sees `input` and `steps`"),
        ("steps", "`steps` needs the name of a step behind it"),
        ("steps[input.x]", "`steps` needs the name of a step behind it"),
        ("1 +", "is no CEL expression"),
        ("\ud800", "is no CEL expression"),
    ],
)
def test_a_wrong_expression_says_how_to_mend_it(source: str, says: str) -> None:
    """A name that isn't defined comes with the nearest one that is."""
    with pytest.raises(DefinitionError) as caught:
        Expression(source)
    assert says in str(caught.value)


def test_a_comment_with_a_quote_is_no_string() -> None:
    """An apostrophe in a comment doesn't hide the code after it."""
    assert Expression("// it's\ninput.map(k, k) // isn't it").evaluate(Scope({"input": {"b": 1, "a": 2}})) == ["a", "b"]


def test_steps_that_an_expression_names() -> None:
    """Names behind `steps` are found, however they are written; what a macro binds is no variable."""
    assert Expression("steps.a.output + steps['b c'].output").steps == {"a", "b c"}
    assert Expression("input.list.map(x, x * 2).filter(y, y > 2).exists(z, z == 4)").steps == frozenset()
    assert Template("{{ steps.a.output }} {{ steps['b'].status }}").steps == {"a", "b"}


def test_errors_of_values_are_evaluation_errors() -> None:
    """What fails on certain values says what: a missing key, a type, a division."""
    for source, says in (("input.nope", "there is no 'nope'"), ("input + 1", r"map \+ int"), ("1 / 0", "zero")):
        with pytest.raises(EvaluationError, match=says):
            Expression(source).evaluate(MAP)


def test_a_condition_is_true_or_false() -> None:
    """A condition with another value is an error, not a truthy guess."""
    assert Expression("input.a == 0").holds(MAP)
    with pytest.raises(EvaluationError, match="neither true nor false but 1"):
        Expression("input.b").holds(MAP)


def test_values_hold_expressions_and_literals() -> None:
    """A string that starts with `=` is computed, `==` writes a literal `=`, all else stays."""
    value = Value({"sum": "= input.a + input.b", "literal": "==x", "list": [1, "=input.c", None], "text": "plain"})
    assert value.evaluate(MAP) == '{"list":[1,2,null],"literal":"=x","sum":1,"text":"plain"}'


def test_templates_refuse_what_is_not_defined() -> None:
    """A name or a key that isn't there is an error, never an empty text."""
    with pytest.raises(DefinitionError, match="`inptu` is not defined; did you mean `input`"):
        Template("{{ inptu.zzz }}")
    for source in ("{{ input.zzz }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(EvaluationError, match="template"):
            Template(source).render(MAP)
    with pytest.raises(DefinitionError, match="line 2"):
        Template("a\n{% if %}")
    with pytest.raises(DefinitionError, match="steps"):
        Template("{{ steps }}")


@settings(max_examples=200)
@given(JSON, st.sampled_from(["input", "[input]", "{'a': input}", "size([input])", "input == input"]))
def test_any_value_passes_or_is_refused(value: object, source: str) -> None:
    """An expression over any JSON value gives a JSON value or an EvaluationError."""
    try:
        from_json(to_json(Expression(source).evaluate(Scope({"input": value}))))
    except EvaluationError as error:
        assert str(error).encode()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 300000000 }}",
        "{{ 300000000 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaa' }}{% endfor %}",
    ],
)
def test_a_template_cannot_make_something_enormous(source: str) -> None:
    """Text is measured while it is made, and a product before it is made."""
    with pytest.raises(EvaluationError, match="too large"):
        Template(source).render(MAP)


def test_a_template_can_multiply() -> None:
    """Numbers, and texts within reason."""
    assert Template("{{ 3 * 2000000 }} {{ 'ab' * 3 }} {{ 2.5 * input.c }}").render(MAP) == "6000000 ababab 5.0"


@pytest.mark.parametrize("source", ["[0] + input", "input.list + input.map", "[1] + (input.map)", "[0] + input.map"])
def test_a_map_is_never_added_to_a_list(source: str) -> None:
    """The library would append its keys in random order, so two owners would decide different bytes."""
    with pytest.raises(EvaluationError, match="a map can't be added"):
        Expression(source).evaluate({"input": {"list": [1], "map": {"a": 1, "b": 2}}})


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("input.a + input.b * 2 > 3 && [1] + [2] == [1, 2]", True),
        ("input.list + input.list.map(x, x + input.a)", [1, 2]),
        ("input.a + -1", 0),
        ("'a' + input.text + string(input.a)", "ab1"),
        ("timestamp(input.at) + duration('1h') == timestamp('2026-01-01T01:00:00Z')", True),
    ],
)
def test_what_can_be_added_is_added(source: str, value: object) -> None:
    """Looking at what is added changes nothing else."""
    given = {"a": 1, "b": 2, "list": [1], "text": "b", "at": "2026-01-01T00:00:00Z"}
    assert Expression(source).evaluate({"input": given}) == value


_NUMBERS = st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
_PLAIN = st.none() | st.booleans() | _NUMBERS | st.text(max_size=3)
_KEYS = st.sampled_from("ab")
_NESTED = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner), max_leaves=4)


@settings(max_examples=300)
@given(_NESTED | st.fixed_dictionaries({"a": _PLAIN | _NESTED}), st.sampled_from(["input.a", "input.b", "input.a.b"]))
def test_a_plain_path_gives_what_cel_gives(value: object, source: str) -> None:
    """Read without CEL, it is CEL's value, or its error where there is none, whatever JSON of whole characters stands there."""
    quick = Expression(source)
    assert quick._path is not None
    slow = Expression(source)
    slow._path = None
    found = []
    for each in (quick, slow):
        try:
            found.append(to_json(each.evaluate(Scope({"input": value}))))
        except EvaluationError as error:
            found.append(str(error))
    assert found[0] == found[1]
