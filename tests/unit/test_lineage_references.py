"""What expressions and templates name, and what for."""

import pytest

from streams.workflow.definition import builtin
from streams.workflow.references import Reference, of_step, of_value
from streams.workflow.spec import Step


def named(source: str) -> set[str]:
    """Return what an expression names, as it would be written."""
    return {".".join(filter(None, (each.root, each.step, each.of))) for each in of_value("x", f"={source}")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("input.question", {"input.question"}),
        ("steps.a.output.rows[0].price", {"steps.a.output.rows[0].price"}),
        ("steps['a'].output['the key']", {"steps.a.output.the key"}),
        ("input.prices[steps.a.output]", {"input.prices", "steps.a.output"}),
        ("steps.a.output.filter(x, x.ok && x.n > input.least).map(y, y.n)", {"steps.a.output", "input.least"}),
        ("steps.a.output.map(input, input.n)", {"steps.a.output"}),
        ("steps.a.status == 'failed' ? item.name : [last, {'k': index}]", {"steps.a.status", "item.name", "last", "index"}),
        ("size(steps.a.output) > 2 && has(input.b)", {"steps.a.output", "input.b"}),
        ("'input.no' + \"steps.no.output\"", set()),
        ("r'\\d'.matches(input.a) ? 1u : 2u", {"input.a"}),
    ],
)
def test_an_expression_names_variables_with_the_keys_behind_them(source: str, expected: set[str]) -> None:
    """Given an expression, then exactly what it names is found: not what macros bind, nor what texts look like."""
    assert named(source) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ input.q }} {{ steps.a.output.text | upper }}", {("input", None, "q"), ("steps", "a", "output.text")}),
        ("{% for f in steps.a.output.facts[:4] %}{{ f.text }}{{ loop.index }}{% endfor %}", {("steps", "a", "output.facts")}),
        ("{% if input.a is defined %}{{ input['b'] }}{% endif %}", {("input", None, "a"), ("input", None, "b")}),
        ("{% set t = steps.a.output %}{{ t.x }}{{ range(3) }}", {("steps", "a", "output")}),
        ("no {# steps.b.output #} names", set()),
    ],
)
def test_a_prompt_names_variables_with_the_keys_behind_them(template: str, expected: set[tuple[str, str | None, str]]) -> None:
    """Given a prompt, then what it names is found, and what its loops and assignments bind is not."""
    step = Step.model_validate({"name": "s", "llm": {"prompt": template}})
    assert {(each.root, each.step, each.of) for each in of_step(step)} == expected
    assert {each.into for each in of_step(step)} <= {"prompt"}


def test_a_use_says_which_argument_it_is_for() -> None:
    """Given arguments in arguments, then each use is known by its whole path, a literal `==` is none, conditions are told."""
    step = Step.model_validate(
        {
            "name": "s",
            "when": "input.go",
            "tool": {"name": "t", "arguments": {"a": {"b": ["=input.x", "==input.no"]}, "c": "=steps.p.output"}},
        }
    )
    assert of_step(step) == (
        Reference("when", "input", None, ("go",)),
        Reference("arguments.a.b[0]", "input", None, ("x",)),
        Reference("arguments.c", "steps", "p", ("output",)),
    )
    assert [each.is_condition for each in of_step(step)] == [True, False, False]


def test_what_is_named_agrees_with_what_the_plan_compiled() -> None:
    """Given each built-in workflow, then the steps that its parts name are those that the plan let them see."""
    for spec in builtin().values():
        for step in spec.steps:
            assert {each.step for each in of_step(step)} - {None} == set(spec.plan.root.steps[step.name].refs)
