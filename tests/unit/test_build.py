"""The Python builder gives the same definitions as YAML."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from streams.workflow.build import INDEX, ITEM, LAST, OUTPUT, Block, Each, Ref, StepRef, Undo, Until, Workflow
from streams.workflow.definition import builtin, parse
from streams.workflow.expressions import DefinitionError
from streams.workflow.spec import Approval, ChildRun, Compensation, ForEach, Llm, Repeat, Step, Tool, WaitFor, WorkflowSpec

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


LOOPS = """
name: loops
input: {type: object}
time_limit: 2h
steps:
  list:
    tool: {name: list_orders, arguments: {day: =input.day}}
  limits:
    transform: {most: 5}
  check:
    needs: [list, limits]
    when: size(steps.list.output) > 0
    for_each: {items: "=steps.list.output.filter(o, o.open)", as: order, concurrency: 7, tolerate: all}
    tool:
      name: check_order
      arguments: {order: =order.id, number: =index, most: =steps.limits.output.most}
    timeout: 5s
    retry: {attempts: 2}
    time_limit: 1m
    compensation: reopen
  plain:
    for_each: {items: [1, 2]}
    llm: {prompt: "Say {{ item }}, {{ index }}."}
  agent:
    needs: [limits, check]
    repeat: {until: "last.done || index > 3", at_most: 10, otherwise: last}
    on_failure: continue
    steps:
      think:
        llm: {prompt: "{{ input.question }} {{ last }} {{ steps.check.failures }}", schema: {type: object}}
      act:
        needs: [think]
        switch:
          search:
            when: steps.think.output.action == 'search'
            tool: {name: search, arguments: {text: =steps.think.output.text}}
          each:
            when: steps.think.output.action == 'each'
            for_each: {items: =steps.think.output.texts}
            steps:
              one: {tool: {name: search, arguments: {text: =item, most: =steps.limits.output.most}}}
              two: {needs: [one], transform: "=steps.one.output"}
          other: {transform: null value}
      note: {needs: [think, act], transform: "=steps.act.status"}
    output: {done: =steps.think.output.done, found: =steps.act.output}
  ask:
    needs: [agent]
    approval:
      message: "Send {{ steps.agent.output.found }}?"
      show: =steps.agent.output
      by: [ada, bob]
      editable: true
      deadline: 2d
      otherwise: reject
      on_reject: continue
    compensation: tell
  paid:
    wait_for: {signal: paid, correlation: =input.order, timeout: 3h, otherwise: =null}
  nap: {sleep: 3d}
  nap_some: {needs: [paid], sleep: =steps.paid.output.wait}
  night: {sleep_until: "2026-12-24T18:00:00+01:00"}
  day: {sleep_until: =input.until}
  child:
    needs: [paid]
    run: {workflow: other, version: abc, input: {x: =steps.paid.output}, detached: true}
    retry: {attempts: 5}
  self: {run: {workflow: loops}}
compensations:
  reopen:
    tool: {name: reopen, arguments: {order: =order.id, ticket: =output.ticket, most: =steps.limits.output.most}}
    retry: {attempts: 9}
    timeout: 10s
  tell: {run: {workflow: tell, version: "1", input: =output}}
finally:
  tidy:
    when: outcome != 'completed'
    tool: {name: tidy, arguments: {why: =error.message, what: =steps.list.output}}
  log: {needs: [tidy], transform: =steps.tidy.status}
output: =steps.ask.output.value
"""


def loops() -> WorkflowSpec:
    """Return the workflow above, written in Python."""
    flow = Workflow("loops", input={"type": "object"}, time_limit="2h")
    listed = flow.tool("list", "list_orders", {"day": flow.input.day})
    limits = flow.transform("limits", {"most": 5})
    orders = Each(f"={listed.output}.filter(o, o.open)", name="order", concurrency=7, tolerate="all")
    reopen = flow.undo_with_tool(
        "reopen",
        "reopen",
        {"order": orders.item.id, "ticket": OUTPUT.ticket, "most": limits.output.most},
        retry={"attempts": 9},
        timeout="10s",
    )
    tell = flow.undo_with_run("tell", "tell", OUTPUT, version="1")
    check = flow.tool(
        "check",
        "check_order",
        {"order": orders.item.id, "number": INDEX, "most": limits.output.most},
        when=f"size({listed.output}) > 0",
        for_each=orders,
        timeout="5s",
        retry={"attempts": 2},
        time_limit="1m",
        compensation=reopen,
    )
    flow.llm("plain", prompt=f"Say {{{{ {ITEM} }}}}, {{{{ {INDEX} }}}}.", for_each=[1, 2])
    again = Until(f"{LAST.done} || {INDEX} > 3", at_most=10, otherwise="last")
    with flow.steps("agent", repeat=again, on_failure="continue") as agent:
        prompt = f"{{{{ {flow.input.question} }}}} {{{{ {LAST} }}}} {{{{ {check.failures} }}}}"
        think = agent.llm("think", prompt=prompt, schema={"type": "object"})
        with agent.switch("act") as act:
            act.tool("search", "search", {"text": think.output.text}, when=f"{think.output.action} == 'search'")
            each = act.steps("each", for_each=think.output.texts, when=f"{think.output.action} == 'each'")
            with each:
                one = each.tool("one", "search", {"text": ITEM, "most": limits.output.most})
                each.transform("two", one.output)
            act.transform("other", "null value")
        agent.transform("note", act.status, needs=[think])
        agent.returns({"done": think.output.done, "found": act.output})
    ask = flow.approval(
        "ask",
        f"Send {{{{ {agent.output.found} }}}}?",
        show=agent.output,
        by=["ada", "bob"],
        editable=True,
        deadline="48h",
        otherwise="reject",
        on_reject="continue",
        compensation=tell,
    )
    paid = flow.wait_for("paid", "paid", correlation=flow.input.order, timeout="3h", otherwise="=null")
    flow.sleep("nap", "3d")
    flow.sleep("nap_some", paid.output.wait)
    flow.sleep_until("night", "2026-12-24T18:00:00+01:00")
    flow.sleep_until("day", flow.input.until)
    flow.run("child", "other", {"x": paid.output}, version="abc", detached=True, retry={"attempts": 5})
    flow.run("self", "loops")
    end = flow.final
    tidy = end.tool("tidy", "tidy", {"why": end.error.message, "what": listed.output}, when=f"{end.outcome} != 'completed'")
    end.transform("log", tidy.status)
    return flow.build(output=ask.output.value)


def test_everything_that_yaml_can_say_has_the_same_digest() -> None:
    """Loops, blocks, switches, waits, approvals, child runs, compensations, clean-up: step by step, and as a whole."""
    from_yaml, built = parse(LOOPS.encode(), "loops.yaml"), loops()
    for ours, theirs in zip(built.steps, from_yaml.steps, strict=True):
        assert ours == theirs
    assert built.compensations == from_yaml.compensations
    assert built.final == from_yaml.final
    assert built.digest == from_yaml.digest


def test_the_yaml_above_says_everything_that_there_is() -> None:
    """A field of a definition that the comparison leaves out would be one that the builder may lack."""
    data = json.loads(parse(LOOPS.encode(), "loops.yaml").canonical) | {"description": "answer() has one"}
    llm = set(Llm.model_fields) | {"schema"}
    said = set(_keys(data))
    for model in (WorkflowSpec, Step, ForEach, Repeat, Approval, WaitFor, ChildRun, Tool, Compensation):
        keys = {info.alias or name for name, info in model.model_fields.items()}
        assert keys - said - llm == set(), model


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _keys(each)
    elif isinstance(value, list):
        for each in value:
            yield from _keys(each)


def test_steps_around_need_what_their_steps_name() -> None:
    """At each level the step that is named, or what has it behind itself; a step inside needs its neighbours only."""
    flow = Workflow("w")
    a, b = flow.transform("a", 1), flow.transform("b", 2)
    with flow.steps("outer") as outer:
        x = outer.transform("x", b.output)
        with outer.steps("inner", for_each=x.output) as inner:
            y = inner.transform("y", [a.output, ITEM])
            inner.transform("z", f"={y.output} + {x.output}")
    after = flow.transform("after", [outer.output, a.output])
    spec = flow.build()
    assert [step.needs for step in spec.steps] == [(), (), ("a", "b"), ("a", "outer")]
    assert spec.steps[2].steps is not None
    assert [step.needs for step in spec.steps[2].steps] == [(), ("x",)]
    assert after.name == "after"


def test_a_block_that_fails_adds_nothing() -> None:
    """What goes wrong within `with` goes on, and the step isn't there."""
    flow = Workflow("w")
    flow.transform("a", 1)
    with pytest.raises(DefinitionError, match="no CEL expression"), flow.steps("b") as block:
        block.transform("c", "=1 +")
    assert [step.name for step in flow.build().steps] == ["a"]


def test_wrong_names_in_loops_are_refused_where_they_stand() -> None:
    """`item` outside of a loop, `last` without a repeat, an undoing of another workflow."""
    flow = Workflow("w")
    for wrong in (ITEM, LAST, INDEX, OUTPUT, Ref("outcome")):
        with pytest.raises(DefinitionError, match="not defined"):
            flow.transform("x", wrong)
    with pytest.raises(DefinitionError, match="not defined"):
        flow.transform("x", 1, for_each=Each(ITEM))
    with pytest.raises(DefinitionError, match="did you mean `row`"):
        flow.transform("x", Ref("rwo"), for_each=Each([1], name="row"))
    with pytest.raises(DefinitionError, match="another workflow"):
        flow.transform("x", 1, compensation=Workflow("v").undo_with_tool("u", "t"))
    undo = flow.undo_with_tool("u", "t", {"x": ITEM})
    with pytest.raises(DefinitionError, match="already"):
        flow.undo_with_run("u", "other")
    with pytest.raises(DefinitionError, match="`item` is not defined"):
        flow.transform("x", 1, compensation=undo)
    flow.transform("x", 1, for_each=[1], compensation=undo)
    assert flow.build().steps[0].compensation == "u"


def test_the_built_in_workflow_can_be_written_in_python() -> None:
    """Step by step, and it is the same version."""
    for spec in (builtin()["market-analysis"], parse(LOOPS.encode(), "loops.yaml"), parse(YAML.encode(), "answer.yaml")):
        assert written(spec).digest == spec.digest


def written(spec: WorkflowSpec) -> WorkflowSpec:
    """Return a definition as the builder makes it, from what another one says."""
    flow = Workflow(spec.name, description=spec.description, input=spec.input, time_limit=spec.time_limit)
    undo: dict[str, Undo] = {}
    for each in spec.compensations:
        options: Any = each.model_dump(include={"retry", "timeout"}, exclude_defaults=True)
        if each.tool:
            undo[each.name] = flow.undo_with_tool(each.name, each.tool.name, each.tool.arguments, **options)
        elif each.run:
            undo[each.name] = flow.undo_with_run(
                each.name, each.run.workflow, each.run.input, version=each.run.version, **options
            )
    fill(flow, spec.steps, undo)
    fill(flow.final, spec.final, undo)
    return flow.build(output=spec.output)


def fill(block: Block, steps: Sequence[Step], undo: Mapping[str, Undo]) -> None:
    """Add steps to a block."""
    for step in steps:
        options: Any = step.model_dump(include={"when", "on_failure", "retry", "timeout", "time_limit"}, exclude_defaults=True)
        options["needs"] = [StepRef(name) for name in step.needs]
        if step.compensation:
            options["compensation"] = undo[step.compensation]
        if step.for_each:
            options["for_each"] = Each(*[getattr(step.for_each, key) for key in ("items", "name", "concurrency", "tolerate")])
        if step.repeat:
            options["repeat"] = Until(step.repeat.until, step.repeat.at_most, step.repeat.otherwise)
        name, body = step.name, getattr(step, step.kind)
        said: Any = body.model_dump(by_alias=True, exclude_defaults=True) if isinstance(body, BaseModel) else {}
        match step.kind:
            case "llm":
                block.llm(name, **said, **options)
            case "tool":
                block.tool(name, body.name, body.arguments, **options)
            case "run":
                block.run(name, **said, **options)
            case "wait_for" | "approval":
                getattr(block, step.kind)(name, **said, **options)
            case "steps" | "switch":
                with getattr(block, step.kind)(name, **options) as inner:
                    fill(inner, body, undo)
                    inner.returns(step.output)
            case _:
                getattr(block, step.kind)(name, body, **options)
