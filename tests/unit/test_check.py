"""What is found in definitions that compile, and what never is."""

from typing import Any

import cel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from streams.workflow import check_expressions, shapes
from streams.workflow.cel_syntax import SyntaxUnknownError
from streams.workflow.cel_syntax import parse as parse_cel
from streams.workflow.check import SETTLED, ToolSchema, check
from streams.workflow.definition import builtin
from streams.workflow.expressions import EvaluationError, Expression, Scope
from streams.workflow.shapes import KINDS, of_schema, of_value
from streams.workflow.spec import WorkflowSpec
from tools.registry import load

INPUT = {
    "type": "object",
    "required": ["ticker"],
    "properties": {
        "ticker": {"type": "string"},
        "count": {"type": "integer"},
        "side": {"enum": ["buy", "sell"]},
        "urgent": {"type": "boolean"},
        "rows": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "string"}}}},
        "extra": {"type": "object", "additionalProperties": True, "properties": {"a": {"type": "string"}}},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tree": {"$ref": "#/$defs/node"},
        "any": {},
    },
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        }
    },
}
ANSWER = {"type": "object", "properties": {"title": {"type": "string"}, "points": {"type": "array", "items": {"type": "string"}}}}
TOOLS = {name: ToolSchema(tool.arguments_schema, tool.result_schema) for name, tool in load().items()}


def found(steps: dict[str, Any], tools: Any = None, **more: Any) -> list[str]:
    """Return what is found in a definition, each with its place."""
    spec = WorkflowSpec.model_validate({"name": "w", "input": INPUT, "steps": steps, **more})
    return [f"{'.'.join(map(str, each.place))}: {each.message}" for each in check(spec, tools)]


def in_expression(source: str) -> list[str]:
    """Return what is found in an expression over the input and a step `llm` with an answer, and one `text` without a schema."""
    steps = {
        "llm": {"llm": {"prompt": "x", "schema": ANSWER}},
        "text": {"llm": {"prompt": "x"}},
        "made": {"transform": {"n": 1, "kind": "=input.urgent ? 'a' : 'b'", "list": [1, 2], "deep": {"x": "=input.count"}}},
        "tool": {"tool": {"name": "unknown"}},
        "it": {"needs": ["llm", "text", "made", "tool"], "transform": f"={source}"},
    }
    return [each.removeprefix("steps.it.transform: ") for each in found(steps)]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("input.tickr", "`input` has no `tickr`; did you mean `ticker`?"),
        ("input['tickr']", "`input` has no `tickr`; did you mean `ticker`?"),
        ("input.rows[0].ix", "`input.rows[0]` has no `ix`; there is `id`"),
        ("input.tree.children[0].children[1].nam", "`input.tree.children[0].children[1]` has no `nam`; did you mean `name`?"),
        ("input.rows.id", "`input.rows.id`: `input.rows` is a list, which has no `id`; name one of its items first, as in `[0]`"),
        ("input.ticker.name", "`input.ticker.name`: `input.ticker` is text, which has no `name`"),
        ("input.count.x", "`input.count.x`: `input.count` is a number, which has no `x`"),
        ("input.ticker[0]", "`input.ticker[0]`: `input.ticker` is text, which has no items"),
        ("input.rows['a']", "`input.rows['a']`: a list has no items by text"),
        ("steps.llm.output.titel", "`steps.llm.output` has no `titel`; did you mean `title`?"),
        ("steps.llm.output.points.map(p, p.x)", "`p.x`: `p` is text, which has no `x`"),
        ("steps.text.output.title", "`steps.text.output.title`: `steps.text.output` is text, which has no `title`"),
        ("steps.llm.outptu", "`steps.llm` has no `outptu`; did you mean `output`?"),
        ("steps.llm.error.mesage", "`steps.llm.error` has no `mesage`; did you mean `message`?"),
        ("steps.tool.failures[0].why", "`steps.tool.failures[0]` has no `why`; there are `index`, `kind`, `message`"),
        ("steps.made.output.m", "`steps.made.output` has no `m`; there are `n`, `kind`, `list`, `deep`"),
        ("steps.made.output.deep.x + 'a'", "a number + text never works; `string(…)`, `int(…)` and `double(…)` convert"),
        ("steps.llm.status == 'complete'", "`steps.llm.status` is never 'complete'; did you mean `completed`?"),
        ("steps.llm.status in ['failed', 'skiped']", "`steps.llm.status` is never 'skiped'; did you mean `skipped`?"),
        ("input.side == 'by'", "`input.side` is never 'by'; did you mean `buy`?"),
        ("'hold' != input.side", "`input.side` is never 'hold'; there are `buy`, `sell`"),
        ("steps.made.output.kind == 'c'", "`steps.made.output.kind` is never 'c'; there are `a`, `b`"),
        ("input.count == '1'", "`input.count == '1'`: a number never equals text"),
        ("input.count + 'a'", "`input.count + 'a'`: a number + text never works; `string(…)`, `int(…)` and `double(…)` convert"),
        ("1.5 % 1.0", "`1.5 % 1.0`: a number % a number never works"),
        ("1 + 1.5", "`1 + 1.5`: a number + a number never works; `string(…)`, `int(…)` and `double(…)` convert"),
        ("input.rows + input.ticker", "`input.rows + input.ticker`: a list + text never works"),
        ("input.ticker > 3", "`input.ticker > 3`: text is never smaller or larger than a number"),
        ("input.ticker ? 1 : 2", "`input.ticker` is text, not true or false"),
        ("input.urgent && input.count", "`input.count` is a number, not true or false"),
        ("!input.ticker", "`input.ticker` is text, not true or false"),
        ("-input.ticker", "`input.ticker` is text, not a number"),
        ("'a' in input.ticker", "`input.ticker` is text, not a list or a mapping"),
        ("input.ticker.map(x, x)", "`input.ticker` is text, but map(…) goes over a list or a mapping"),
        ("input.rows.filter(r, r.id)", "`r.id` is text, not true or false"),
        ("input.ticker.lowerAscii()", "`input.ticker.lowerAscii()`: there is no function `lowerAscii`"),
        ("siez(input.rows)", "`siez(input.rows)`: there is no function `siez`; did you mean `size`?"),
        ("size(input.count)", "`input.count` is a number, not text or a list or a mapping"),
        ("input.count.startsWith('a')", "`input.count` is a number, not text"),
        ("duration('1h')", "`duration('1h')` gives what JSON can't say; write it as text: string(…)"),
    ],
)
def test_what_can_never_work_is_found(source: str, says: str) -> None:
    """Once, with the nearest right name where there is one."""
    problems = in_expression(source)
    assert len(problems) == 1, problems
    assert says in problems[0]


@pytest.mark.parametrize(
    "source",
    [
        "input.any.whatever[0].x + 1",
        "input.extra.b.c",
        "input.extra.a + 'x'",
        "steps.tool.output.rows[0].price * 2.5",
        "steps.text.output + '!'",
        "steps.text.output == null ? 'none' : steps.text.output",
        "steps.llm.output == null ? [] : steps.llm.output.points + ['x']",
        "steps.llm.error != null && steps.llm.error.message.contains('x')",
        "steps.tool.failures.map(f, f.index)",
        "has(input.later) ? input.later : 1",
        "'later' in input && input.later > 3",
        "input.maybe == null || input.maybe.startsWith('a')",
        "input.count + 1",
        "input.count * 1.5 > input.count - 2.0",
        "input.count < 1.5",
        "input.count == 1.0",
        "input.side == 'buy' || input.side in ['sell']",
        "size(input.rows) > 0 && input.rows.exists(r, r.id == 'a')",
        "input.rows.map(r, {'id': r.id, 'n': 1}).filter(r, r.n > 0)[0].id",
        "input.extra.map(k, input.extra[k])",
        "input.tree.children.map(c, c.children.map(d, d.name))",
        "string(duration('1h')) + string(input.count)",
        "timestamp('2026-01-01T00:00:00Z') < timestamp('2027-01-01T00:00:00Z')",
        "timestamp('2026-01-01T00:00:00Z').getFullYear() + 1",
        "{'a': 1}.a + {'b': [2]}['b'][0]",
        "[1, 'a', null][0]",
        "dyn(1) == 'a' || type(1) == type(2)",
        "b'a' == bytes('a') && 1u + 2u > 2u",
        "steps.made.output.list[0] + steps.made.output.n",
        "input.urgent ? 'a' : 1",
        "input.ticker.matches('^[A-Z]+$') && !input.urgent",
    ],
)
def test_what_may_work_is_never_found(source: str) -> None:
    """What is open, unknown, asked for before, or right."""
    assert in_expression(source) == []


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("{{ input.tickr }}", "`input` has no `tickr`; did you mean `ticker`?"),
        ("a\nb {{ input.tickr }}", "line 2: `input` has no `tickr`"),
        ("{{ input['tickr'] | upper }}", "`input` has no `tickr`"),
        ("{% for row in input.rows %}{{ row.idd }}{% endfor %}", "`row` has no `idd`; did you mean `id`?"),
        ("{% for row in input.rows[:4] if row.x %}{{ row.id }}{% endfor %}", "`row` has no `x`; there is `id`"),
        ("{% if input.sid == 'buy' %}x{% endif %}", "`input` has no `sid`; did you mean `side`?"),
        (
            "{{ input.rows.id }}",
            "`input.rows` is a list, which has no `id`; name one of its items, as in `[0]`, or go through it",
        ),
        ("{{ input.ticker.upper() }}", "`input.ticker` is text, which has no `upper`"),
        ("{% for x in input.count %}{% endfor %}", "`input.count` is a number, which can't be gone through"),
        ("{{ input.rows | map(attribute=input.nope) | join }}", "`input` has no `nope`"),
        ("{{ (input.rows | first).x }}", "`(…)` has no `x`; there is `id`"),
        ("{{ input.tree.children[0].nam }}", "`input.tree.children[0]` has no `nam`; did you mean `name`?"),
    ],
)
def test_prompts_are_checked(prompt: str, says: str) -> None:
    """Names, members of texts and numbers, loops; with the line in the template."""
    problems = found({"a": {"llm": {"prompt": "x", "system": prompt}}})
    assert len(problems) == 1, problems
    assert says in problems[0]
    assert problems[0].startswith("steps.a.llm.system: ")


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ input.later is defined }}{{ input.later | default('x') }}{% if 'more' in input %}{{ input.more }}{% endif %}",
        "{% for row in input.rows %}{{ loop.index }} {{ row.id }}{% else %}none{% endfor %}",
        "{% for key, value in input.extra | dictsort %}{{ key.x }}{{ value.y }}{% endfor %}",
        "{% set row = input.rows[0] %}{{ row.anything }}",
        "{% for row in input.rows %}{% set x = row.id %}{{ x }}{% endfor %}{{ input.any.a.b[0].c }}",
        "{{ input.rows | map(attribute='id') | join(', ') }} {{ (input.rows | tojson).x is defined }}",
        "{{ input.rows | groupby('id') | first | attr('grouper') }}",
        "{% macro m(x) %}{{ x.y }}{% endmacro %}{{ m(input.ticker) }}{{ input.ticker[0] }}{{ input.ticker | upper }}",
        "{% for row in input.rows recursive %}{{ row.id }}{{ loop(row.children) }}{{ row.parts }}{% endfor %}",
        "{{ range(3) | list }}{{ input.extra.b }}{{ 'x' if input.urgent else input.ticker ~ input.count }}",
    ],
)
def test_prompts_that_may_work_are_left_alone(prompt: str) -> None:
    """What a template asks for, sets itself, or makes with filters that say nothing of their result."""
    assert found({"a": {"llm": {"prompt": prompt}}}) == []


def test_loops_and_blocks_have_shapes() -> None:
    """Items, numbers, what was last, and what steps of steps amount to."""
    assert found(
        {
            "each": {"for_each": {"items": "=input.rows", "as": "row"}, "transform": {"id": "=row.idd", "n": "=index + 'a'"}},
            "after": {
                "needs": ["each"],
                "transform": ["=steps.each.output[0].n", "=steps.each.output.id", "=steps.each.output[0].m"],
            },
            "literal": {"for_each": {"items": [{"a": 1}, {"b": 2}]}, "transform": "=item.c"},
            "text": {"for_each": {"items": "=input.ticker"}, "transform": "=item"},
            "again": {
                "repeat": {"until": "last.dne", "at_most": 3},
                "steps": {"one": {"transform": {"done": True}}, "two": {"needs": ["one"], "transform": "=steps.one.output"}},
                "output": {"done": "=steps.two.output.done", "before": "=last == null ? 0 : last.beefore"},
            },
            "case": {
                "switch": {
                    "a": {"when": "input.count", "transform": {"x": 1}},
                    "b": {"when": "1 > 2", "transform": {"y": 1}},
                    "c": {"transform": "=input.tickr"},
                }
            },
            "last": {"needs": ["case", "again"], "transform": ["=steps.case.output.z", "=steps.again.output.after"]},
        }
    ) == [
        "steps.each.transform.id: `row` has no `idd`; did you mean `id`?",
        "steps.each.transform.n: `index + 'a'`: a number + text never works; `string(…)`, `int(…)` and `double(…)` convert",
        (
            "steps.after.transform.1: `steps.each.output.id`: `steps.each.output` is a list, which has no `id`; "
            "name one of its items first, as in `[0]`"
        ),
        "steps.after.transform.2: `steps.each.output[0]` has no `m`; there are `id`, `n`",
        "steps.literal.transform: `item` has no `c`; there are `a`, `b`",
        "steps.text.for_each.items: the items are text, not a list",
        "steps.again.output.before: `last` has no `beefore`; did you mean `before`?",
        "steps.again.repeat.until: `last` has no `dne`; did you mean `done`?",
        "steps.case.switch.a.when: `input.count` is a number, not true or false",
        "steps.case.switch.b.when: `1 > 2` is never true: the step never runs",
        "steps.case.switch.c.transform: `input` has no `tickr`; did you mean `ticker`?",
        "steps.last.transform.1: `steps.again.output` has no `after`; there are `done`, `before`",
    ]


def test_waits_approvals_compensations_and_clean_up_are_checked() -> None:
    """Each sees what it has: a fixed answer of a person, `output`, `outcome` and `error`."""
    assert found(
        {
            "ask": {"approval": {"message": "{{ input.tickr }}", "show": {"a": "=input.side"}}, "compensation": "undo"},
            "use": {"needs": ["ask"], "transform": ["=steps.ask.output.aproved", "=steps.ask.output.value.b"]},
            "edit": {"approval": {"message": "x", "show": {"a": 1}, "editable": True}},
            "used": {"needs": ["edit"], "transform": "=steps.edit.output.value.b + steps.edit.output.by"},
            "signal": {"wait_for": {"signal": "s", "correlation": "=input.tickr", "timeout": "1h", "otherwise": "=input.siede"}},
            "any": {"needs": ["signal"], "transform": "=steps.signal.output.whatever.x"},
            "nap": {"sleep": "=input.rows"},
            "until": {"sleep_until": "=input.urgent"},
            "fine": {"sleep": "=input.ticker"},
            "child": {"run": {"workflow": "other", "input": {"x": "=input.tickr"}}},
            "open": {"needs": ["child"], "transform": "=steps.child.output.a.b"},
        },
        compensations={"undo": {"tool": {"name": "t", "arguments": {"x": "=output.valeu", "y": "=input.tickr"}}}},
        **{
            "finally": {
                "tidy": {"when": "outcome == 'complete'", "transform": ["=error.mesage", "=steps.use.status == 'running'"]}
            }
        },
    ) == [
        "steps.ask.approval.message: `input` has no `tickr`; did you mean `ticker`?",
        "compensations.undo.tool.arguments.x: `output` has no `valeu`; did you mean `value`?",
        "compensations.undo.tool.arguments.y: `input` has no `tickr`; did you mean `ticker`?",
        "steps.use.transform.0: `steps.ask.output` has no `aproved`; did you mean `approved`?",
        "steps.use.transform.1: `steps.ask.output.value` has no `b`; there is `a`",
        "steps.signal.wait_for.correlation: `input` has no `tickr`; did you mean `ticker`?",
        "steps.signal.wait_for.otherwise: `input` has no `siede`; did you mean `side`?",
        "steps.nap.sleep: the time is a list, not a text or a number",
        "steps.until.sleep_until: the time is true or false, not a text or a number",
        "steps.child.run.input.x: `input` has no `tickr`; did you mean `ticker`?",
        "finally.tidy.when: `outcome` is never 'complete'; did you mean `completed`?",
        "finally.tidy.transform.0: `error` has no `mesage`; did you mean `message`?",
    ]


def test_arguments_are_held_against_the_tools_schema() -> None:
    """What is missing, unknown, or of another type or value; constants by the whole schema."""
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["text", "many"],
        "properties": {
            "text": {"type": "string", "maxLength": 3},
            "many": {"type": "array", "items": {"type": "integer"}},
            "mode": {"enum": ["fast", "slow"]},
            "deep": {"type": "object", "required": ["a"], "additionalProperties": False, "properties": {"a": {"type": "number"}}},
            "free": {},
        },
    }
    tools = {"work": ToolSchema(schema, {"type": "array", "items": {"type": "string"}})}

    def said(**arguments: Any) -> list[str]:
        steps = {"a": {"transform": 1}, "x": {"needs": ["a"], "tool": {"name": "work", "arguments": arguments}}}
        return [each.removeprefix("steps.x.tool.arguments") for each in found(steps, tools)]

    fine = {"text": "abc", "many": [1, "=input.count"]}
    assert said(**fine, mode="fast", deep={"a": "=input.count"}, free={"x": "=input.any"}) == []
    assert said(text="=input.any", many="=input.extra.b", deep="=input.any", mode="=input.ticker") == []
    assert said(**fine, deep="=input.extra") == [".deep.a: is text, not a number"]
    assert said(many=[]) == [": `work` needs the argument `text`"]
    assert said(**fine, moed=1) == [".moed: `work` takes no argument `moed`; did you mean `mode`?"]
    assert said(text="abcd", many=[]) == [".text: 'abcd' is too long"]
    assert said(text="=input.count", many="=input.ticker") == [".text: is a number, not text", ".many: is text, not a list"]
    assert said(text="a", many=["=input.ticker", 1, "=input.rows"]) == []  # one of them may be right
    assert said(text="a", many=["=input.ticker"]) == [".many.0: is text, not a number"]
    assert said(**fine, mode="=input.side") == [".mode: is 'buy', 'sell', not one of 'fast', 'slow'"]
    assert said(**fine, deep={"b": "=input.count"}) == [".deep: `a` is missing", ".deep.b: unknown key `b`; there is `a`"]


def test_the_built_in_workflow_is_right() -> None:
    """Also with the tools that it calls."""
    spec = builtin()["market-analysis"]
    assert check(spec) == []
    assert check(spec, TOOLS) == []


def test_a_slip_in_the_built_in_workflow_is_found() -> None:
    """Through tools' results and transforms, as far as their types go."""
    text = builtin()["market-analysis"].canonical
    for right, wrong, says in (
        ("steps.fetch.output.rows", "steps.fetch.output.row", "`steps.fetch.output` has no `row`; did you mean `rows`?"),
        ("steps.plan.output.reading.end", "steps.plan.output.reding.end", "has no `reding`; did you mean `reading`?"),
        ("steps.understand.status == 'completed'", "steps.understand.status == 'done'", "is never 'done'"),
        ('"name":"fetch_prices"', '"name":"fetch_price"', "no tool `fetch_price`; did you mean `fetch_prices`?"),
        ("fact.text", "fact.txt", "`fact` has no `txt`; did you mean `text`?"),
    ):
        assert right in text
        problems = check(WorkflowSpec.model_validate_json(text.replace(right, wrong)), TOOLS)
        assert any(says in each.message for each in problems), (wrong, problems)


def test_what_a_step_can_be_is_what_it_is_in_a_run() -> None:
    """The words of a step's status are those of the state machine."""
    from streams.workflow import state  # noqa: PLC0415

    assert set(SETTLED) == {status.value for status in state.SETTLED}


def test_the_functions_are_those_of_the_runtime() -> None:
    """The library knows each function that the checker knows, and none that the checker refuses."""
    for name in check_expressions._RESULTS:
        knows = []
        for source in (f"{name}('1')", f"'1'.{name}('1')", f"timestamp('2026-01-01T00:00:00Z').{name}()", f"{name}('1h')"):
            try:
                cel.evaluate(source)
                knows.append(source)
            except (RuntimeError, ValueError, TypeError) as error:
                if "Undefined" not in str(error):
                    knows.append(source)
        assert knows or name in {"timestamp", "duration"}, name
    for name in ("bool", "lowerAscii", "split", "join", "min", "abs", "trim", "substring", "format", "sum"):
        with pytest.raises(RuntimeError, match="Undefined"):
            cel.evaluate(f"'1'.{name}()")


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {},
            {"type": "string"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["a", "b"]},
        ]
    )
    | st.just({"type": ["string", "null"]})
    | st.just({"const": 1}),
    lambda inner: (
        st.builds(lambda items: {"type": "array", "items": items}, inner)
        | st.builds(
            lambda properties, more: {"type": "object", "properties": properties, "additionalProperties": more},
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            st.booleans() | inner,
        )
        | st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)
        | st.builds(lambda one, two: {"allOf": [one, two]}, inner, inner)
    ),
    max_leaves=5,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, 1.0, "a", "b", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
OPERATORS = ("+", "-", "*", "/", "%", "==", "!=", "<", ">=", "in", "&&", "||")
SOURCES = st.recursive(
    st.sampled_from(["input", "1", "1.5", "'a'", "true", "null", "[1]", "{'a': 'b'}", "[]"]),
    lambda inner: (
        st.builds("{}.{}".format, inner, st.sampled_from("abc"))
        | st.builds("({}[{}])".format, inner, st.sampled_from(["0", "'a'"]))
        | st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner)
        | st.builds("({} ? {} : {})".format, inner, inner, inner)
        | st.builds("{}.map(x, {})".format, inner, st.sampled_from(["x", "x + 1", "x.a"]))
        | st.builds("{}.filter(x, {})".format, inner, st.sampled_from(["x", "x == 1", "x.a == 'b'"]))
        | st.builds("size({})".format, inner)
        | st.builds("string({})".format, inner)
        | st.builds("has({}.a)".format, inner)
    ),
    max_leaves=4,
)


@settings(max_examples=500, deadline=None)
@given(SCHEMAS, VALUES, SOURCES)
def test_what_evaluates_has_the_shape_that_was_inferred(schema: Any, value: Any, source: str) -> None:
    """For any schema, any value that fits it and any expression: no value is of a kind that was ruled out."""
    if not Draft202012Validator(schema).is_valid(value):
        return
    reported: list[str] = []
    shape = check_expressions.infer(source, {"input": of_schema(schema)}, reported.append)
    try:
        result = Expression(source).evaluate(Scope({"input": value}))
    except EvaluationError:
        return
    assert of_value(result).kinds <= shape.kinds or not of_value(result).kinds, (shape.kinds, result)


@settings(max_examples=500, deadline=None)
@given(VALUES, SOURCES)
def test_an_expression_that_works_on_a_value_is_not_challenged(value: Any, source: str) -> None:
    """If the input has exactly the shape of a value on which each part works, nothing is reported but what is never equal."""
    reported: list[str] = []
    check_expressions.infer(source, {"input": of_value(value)}, reported.append)
    if not reported or any(word in source for word in ("?", "&&", "||", "[]", ".map", ".filter", "has(")):
        return  # what isn't evaluated on this value may be wrong all the same
    try:
        Expression(source).evaluate(Scope({"input": value}))
    except EvaluationError:
        return
    allowed = (" never equals ", " is never ", "never equal", "a list + a mapping")
    assert all(any(words in each for words in allowed) for each in reported), reported


@settings(deadline=None)
@given(SOURCES)
def test_cel_is_read_as_the_library_reads_it(source: str) -> None:
    """Each expression that compiles has a tree; what isn't understood is said to be so, and nothing is found in it."""
    cel.compile(source)
    assert parse_cel(source).source


@pytest.mark.parametrize("source", [".input.a", "a{b: 1}", "(" * 3000 + "1" + ")" * 3000, "#", "1 +", "a.1"])
def test_what_is_no_cel_known_here_is_left_alone(source: str) -> None:
    """It has no tree, and any shape."""
    with pytest.raises(SyntaxUnknownError):
        parse_cel(source)
    assert check_expressions.infer(source, {}, pytest.fail).kinds == KINDS


def test_what_is_too_long_to_follow_is_left_alone() -> None:
    """A chain of thousands of operators compiles, and nothing is found in it."""
    assert in_expression("+".join(["1"] * 2000)) == []
    assert found({"a": {"llm": {"prompt": "{{ " + "+".join(["1"] * 300) + " }}"}}}) == []


def test_a_schema_that_contains_itself_ends() -> None:
    """Also one that stands for itself, and one that doubles at each of its parts."""
    assert of_schema({"$ref": "#"}).kinds == KINDS - {"other"}
    doubling = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    assert of_schema({"$ref": "#/$defs/d0", "$defs": {**doubling, "d60": {"type": "string"}}}).kinds == {"text"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"type": "object", "properties": {"a": {}}, "if": {}, "then": {"properties": {"b": {}}}},
        {"type": "object", "required": ["a"]},
        {"type": "object"},
        {"anyOf": [{"properties": {"a": {}}, "type": "object"}, {"type": "object"}]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"$ref": "https://elsewhere.example/schema"},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        True,
        {},
    ],
)
def test_open_schemas_have_any_key(schema: Any) -> None:
    """What says that there may be more, or says it in a way that isn't read here, is open."""
    assert of_schema(schema).member("b") is not None


def test_declared_properties_are_all_there_are() -> None:
    """A schema that declares properties means those, unless it says that there are more."""
    assert of_schema({"type": "object", "properties": {"a": {}}}).member("b") is None
    assert of_schema({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}).member("c") is None
    assert shapes.either([shapes.record(a=shapes.TEXT), shapes.record(b=shapes.TEXT)]).member("c") is None
