"""The Python builder gives the same definitions as YAML."""

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from streams.workflow.build import Ref, StepRef, Workflow
from streams.workflow.definition import builtin, parse
from streams.workflow.expressions import DefinitionError
from streams.workflow.spec import WorkflowSpec

YAML = """
name: answer
description: Answers a question.
input: {type: object, required: [question], properties: {question: {type: string}}}
steps:
  understand:
    llm:
      prompt: "Question: {{ input.question }}"
      system: Be short.
      schema: {type: object, required: [topic]}
      max_tokens: 40
    on_failure: continue
    retry: {attempts: 2, initial: 500ms}
    timeout: 1.5m
  check:
    needs: [understand]
    when: steps.understand.status == 'completed'
    tool:
      name: check_plan
      arguments: {question: =input.question, plan: =steps.understand.output, words: ["=steps.understand.output.topic", 3]}
  pick:
    needs: [check]
    transform: {text: '=steps.check.output.rows[0]["a b"] + steps.understand.output.topic', "by": rule}
output: {answer: =steps.pick.output.text}
"""


def answer() -> WorkflowSpec:
    """Return the workflow above, written in Python."""
    flow = Workflow(
        "answer",
        description="Answers a question.",
        input={"type": "object", "required": ["question"], "properties": {"question": {"type": "string"}}},
    )
    understand = flow.llm(
        "understand",
        prompt=f"Question: {{{{ {flow.input.question} }}}}",
        system="Be short.",
        schema={"type": "object", "required": ["topic"]},
        max_tokens=40,
        on_failure="continue",
        retry={"attempts": 2, "initial": "500ms"},
        timeout="90s",
    )
    check = flow.tool(
        "check",
        "check_plan",
        {"question": flow.input.question, "plan": understand.output, "words": (understand.output.topic, 3)},
        when=f"{understand.status} == 'completed'",
    )
    pick = flow.transform(
        "pick",
        {"text": f"={check.output.rows[0]['a b']} + {understand.output.topic}", "by": "rule"},
        needs=[check],
    )
    return flow.build(output={"answer": pick.output.text})


def test_the_same_workflow_has_the_same_digest() -> None:
    """Whether it is written in YAML or in Python."""
    from_yaml = parse(YAML.encode(), "answer.yaml")
    assert answer() == from_yaml
    assert answer().digest == from_yaml.digest


def test_what_an_expression_names_is_needed() -> None:
    """Directly, unless a step that is needed needs it already."""
    flow = Workflow("w")
    a = flow.transform("a", 1)
    b = flow.transform("b", 2)
    flow.transform("c", [b.output, a.output])
    d = flow.transform("d", b.output)
    flow.transform("e", b.output, needs=[d])
    flow.transform("f", 1, when=f"{a.error} == null && {d.status} == 'completed'")
    flow.llm("g", prompt=f"{{{{ {b.output} }}}}", system=f"{{{{ {a.output} }}}}")
    assert [step.needs for step in flow.build().steps] == [(), (), ("a", "b"), ("b",), ("d",), ("a", "d"), ("a", "b")]


def test_many_paths_to_a_step_take_no_longer() -> None:
    """Each step needs the two before it: as many paths as Fibonacci's numbers."""
    flow = Workflow("w")
    last = [flow.transform("s0", 0), flow.transform("s1", 1)]
    for i in range(2, 200):
        last = [last[1], flow.transform(f"s{i}", f"={last[0].output} + {last[1].output}")]
    assert len(flow.build().steps) == 200


def test_references_spell_what_cel_and_jinja_read() -> None:
    """Attributes, items by number and by any text."""
    ref = Ref("steps.a.output")
    assert str(ref.rows[0]["a b"].c) == 'steps.a.output.rows[0]["a b"].c'
    assert str(copy.deepcopy(ref)) == "steps.a.output"


def test_a_reference_has_no_value_yet() -> None:
    """What Python would decide at once, and wrongly, is refused."""
    flow = Workflow("w")
    a = flow.transform("a", 1)
    with pytest.raises(DefinitionError, match="no value yet"):
        bool(a.output)
    with pytest.raises(TypeError):
        iter(a.output)
    with pytest.raises(DefinitionError, match="did you mean its `output`"):
        flow.transform("b", {"x": a})


def test_wrong_workflows_are_refused() -> None:
    """As early as they can be seen to be wrong."""
    flow = Workflow("w")
    flow.transform("a", 1)
    with pytest.raises(DefinitionError, match="already"):
        flow.transform("a", 2)
    with pytest.raises(DefinitionError, match="no CEL expression"):
        flow.transform("b", "=1 +")
    flow.transform("c", "=steps.d.output")
    with pytest.raises(ValidationError, match="there is no step `d`"):
        flow.build()


def test_the_built_in_workflow_can_be_written_in_python() -> None:
    """Step by step, and it is the same version."""
    spec = builtin()["market-analysis"]
    flow = Workflow(spec.name, description=spec.description, input=spec.input)
    refs: dict[str, StepRef] = {}
    for step in spec.steps:
        needs = [refs[name] for name in step.needs]
        options: Any = step.model_dump(include={"when", "on_failure", "retry", "timeout"}, exclude_defaults=True)
        if step.llm:
            llm: Any = step.llm.model_dump(by_alias=True, exclude_defaults=True)
            refs[step.name] = flow.llm(step.name, **llm, **options, needs=needs)
        elif step.tool:
            refs[step.name] = flow.tool(step.name, step.tool.name, step.tool.arguments, **options, needs=needs)
        else:
            refs[step.name] = flow.transform(step.name, step.transform, **options, needs=needs)
    assert flow.build(output=spec.output).digest == spec.digest
