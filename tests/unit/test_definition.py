"""Definitions in YAML files, and what is said about wrong ones."""

import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.workflow.check import ToolSchema
from streams.workflow.definition import DefinitionFileError, builtin, load, load_all, parse
from streams.workflow.spec import from_canonical

BUILT_IN = Path(__file__).parents[2] / "streams/workflows/market_analysis.yaml"
GOOD = "name: w\nsteps: {a: {transform: 1}}\n"


def problems(text: str | bytes) -> list[str]:
    """Return what is wrong with a text, as it is printed."""
    with pytest.raises(DefinitionFileError) as caught:
        parse(text if isinstance(text, bytes) else text.encode(), "f.yaml")
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(each) for each in caught.value.problems]


def step(body: str) -> str:
    """Return a workflow of a good step, in line 3, and one with this body, from line 5."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"name: w\nsteps:\n  first: {{transform: 1}}\n  a:\n{lines}"


def test_the_built_in_workflow_is_there() -> None:
    """Found in the package as in a file."""
    assert builtin()["market-analysis"].digest == load(BUILT_IN).digest


def test_all_problems_are_said_at_once() -> None:
    """Each with its place, and with the nearest right name."""
    assert problems(
        """\
name: Market Analysis
descripton: x
input: {type: objekt}
steps:
  a:
    timeout: 60 secs
    llm:
      promt: hi
      schema: {type: objekt}
  fetch:
    needs: [a]
    tool:
      name: t
      argumnets: {}
  b:
    needs: [fetch]
    when: steps.fetch.status = 'x'
    transform: 1
  c:
    needs: [b]
    prompt: x
    on_failure: contnue
    transform: 1
  d: {transform: =steps.b.output}
  e:
    retry: {attempts: 0, initial: abc}
    transform: 1
  g: 5
  h: {needs: [hh], transform: 1}
  i: {needs: [b, 7, d], tool: {}, colour: red}
output: =steps.fech.output
"""
    ) == [
        "f.yaml:1:1: name: must match pattern '^[a-z0-9][a-z0-9._-]{0,99}$', not `Market Analysis`",
        "f.yaml:2:1: unknown key `descripton`; did you mean `description`?",
        "f.yaml:3:1: input: no JSON Schema: 'objekt' is not valid under any of the given schemas",
        "f.yaml:6:5: steps.a.timeout: `60 secs` is no duration; write 500ms, 60s, 5m, 2h or 3d",
        "f.yaml:7:5: steps.a.llm: `prompt` is missing",
        "f.yaml:8:7: steps.a.llm: unknown key `promt`; did you mean `prompt`?",
        "f.yaml:14:7: steps.fetch.tool: unknown key `argumnets`; did you mean `arguments`?",
        "f.yaml:15:3: steps.b: `steps.fetch.status = 'x'` is no CEL expression: ERROR: <input>:1:20: Syntax error: token recognition error at: '= '",  # noqa: E501
        "f.yaml:21:5: steps.c: unknown key `prompt`; did you mean `llm.prompt`?",
        "f.yaml:22:5: steps.c.on_failure: must be 'fail' or 'continue', not `contnue`",
        "f.yaml:24:3: steps.d: names steps.b but doesn't need it; add it to `needs`",
        "f.yaml:26:13: steps.e.retry.attempts: must be greater than or equal to 1, not `0`",
        "f.yaml:26:26: steps.e.retry.initial: `abc` is no duration; write 500ms, 60s, 5m, 2h or 3d",
        "f.yaml:28:3: steps.g: must be a mapping, not `5`",
        "f.yaml:29:7: steps.h.needs: there is no step `hh`; did you mean `h`?",
        "f.yaml:30:18: steps.i.needs[1]: must be a valid string, not `7`",
        "f.yaml:30:25: steps.i.tool: `name` is missing",
        "f.yaml:30:35: steps.i: unknown key `colour`; there are `name`, `needs`, `when`, `llm`, `tool`, `transform`, `run`, `wait_for`, `approval`, `sleep`, `sleep_until`, `switch`, `steps`, `output`, `for_each`, `repeat`, `on_failure`, `retry`, `timeout`, `time_limit`, `compensation`",  # noqa: E501
        "f.yaml:31:1: output: there is no step `fech`; did you mean `fetch`?",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f.yaml:1:1: the file is empty; a workflow needs `name` and `steps`"),
        ("# nothing\n", "f.yaml:1:1: the file is empty; a workflow needs `name` and `steps`"),
        ("- a\n", "f.yaml:1:1: a workflow is a mapping with `name` and `steps`"),
        ("name: w\n\tsteps: 1", "f.yaml:2:1: a tab stands here; YAML is indented with spaces"),
        ("name: [1, 2", "f.yaml:1:12: not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("name: w: x", "f.yaml:1:8: not YAML: mapping values are not allowed here"),
        ("name: *b", "f.yaml:1:7: not YAML: found undefined alias 'b'"),
        (f"{GOOD}---\n{GOOD}", "f.yaml:3:1: not YAML: expected a single document in the stream, but found another document"),
        ("name: \x01", "f.yaml:1:1: not YAML: unacceptable character #x0001: special characters are not allowed"),
        (b"name: w\nsteps: \xff", "f.yaml:2:8: this is not UTF-8"),
        (f"{GOOD}? [a]\n: 1", "f.yaml:3:3: a key must be text"),
        (f"{GOOD}<<: {{a: 1}}", "f.yaml:3:1: `<<` is not known here; only whole values can be repeated, with & and *"),
        (f"{GOOD}name: v", "f.yaml:3:1: `name` stands here twice, first in line 1"),
        ("name: w", "f.yaml:1:1: `steps` is missing"),
        (step("transform: .inf"), "f.yaml:5:5: steps.a.transform: `.inf` is no number that JSON knows"),
        (step(f"transform: {'9' * 5000}"), f"f.yaml:5:5: steps.a.transform: `{'9' * 50}` can't be read: Exceeds the limit"),
        (step("transform: !!binary aGk="), "f.yaml:5:5: steps.a.transform: the tag `tag:yaml.org,2002:binary` is not allowed"),
        (
            step("transform: !!python/object/apply:os.system [x]"),
            "f.yaml:5:5: steps.a.transform: the tag `tag:yaml.org,2002:python/object/apply:os.system` is not allowed",
        ),
        (step("needs: [b]\ntransform: 1"), "f.yaml:5:5: steps.a.needs: there is no step `b`"),
        (step("transform: 1\ntool: {name: t}"), "f.yaml:4:3: steps.a: a step is one of llm, tool, transform, "),
        (step("llm: {prompt: x, schema: {type: 1}}"), "f.yaml:5:22: steps.a.llm.schema: no JSON Schema"),
        (step("llm:\n  prompt: '{{ x'"), "f.yaml:4:3: steps.a: template, line 1"),
        ("name: w\nsteps: [{name: a, transform: 1}, {name: b, transform: =x}]", "f.yaml:2:34: steps[1]: `x`: `x` is not defined"),
        (step('transform: "\\ud800"'), "f.yaml:5:16: a text with half of a surrogate pair is none"),
        (step('transform: {"\\ud800": 1}'), "f.yaml:5:17: a text with half of a surrogate pair is none"),
        ("name: w\nsteps: {a b: {transform: 1}}", "f.yaml:2:9: steps.a b.name: must match pattern"),
        ("name: " + "[" * 3000, "f.yaml:1:1: not YAML: maximum recursion depth exceeded"),
        ("name: " + "[" * 60 + "]" * 60, "f.yaml:1:57: it has more than 50 levels"),
        ("x: &x [*x]", "f.yaml:1:4: it has more than 50 levels, aliases included"),
    ],
)
def test_a_problem_has_its_place(text: str | bytes, says: str) -> None:
    """Line and column count from 1."""
    found = problems(text)
    assert any(each.startswith(says) for each in found), found


def test_a_small_file_never_becomes_a_large_definition() -> None:
    """A billion laughs."""
    lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)]
    start = time.thread_time()  # what others do on the machine doesn't count
    assert "it has more than 50,000 values, aliases included" in problems("\n".join(lines))[-1]
    assert time.thread_time() - start < 10
    assert "larger than" in problems("#" * 2_000_000)[0]


def test_yaml_gives_what_json_can_say() -> None:
    """A date is text, so are `yes` and `no`, and a value can be repeated."""
    spec = parse(step("transform: {d: 2020-01-01, y: yes, n: &n [1, 0.5, true, null, ~, 0o17], m: *n, 1: one}").encode(), "f")
    values = [1, 0.5, True, None, None, 15]
    assert spec.steps[1].transform == {"d": "2020-01-01", "y": "yes", "n": values, "m": values, "1": "one"}


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    """Problems of all files are said at once; one name is one file."""
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yml").write_text(GOOD.replace("w", "v"))
    (tmp_path / "notes.txt").write_text("no workflow")
    assert list(load_all([tmp_path])) == ["w", "v"]
    assert list(load_all([tmp_path / "b.yml", tmp_path])) == ["v", "w"]
    (tmp_path / "c.yaml").write_text("\ufeff" + GOOD, encoding="utf-8")
    (tmp_path / "d.yaml").write_text("name: d")
    with pytest.raises(DefinitionFileError) as caught:
        load_all([tmp_path, tmp_path / "none.yaml"])
    assert [str(each).removeprefix(f"{tmp_path}/") for each in caught.value.problems] == [
        f"c.yaml:1:1: name: there is a `w` in {tmp_path}/a.yaml already",
        "d.yaml:1:1: `steps` is missing",
        "none.yaml:1:1: can't be read: No such file or directory",
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_mangled_is_said_to_be_wrong_or_understood(data: st.DataObject) -> None:
    """No text makes the reader fail in another way."""
    lines = BUILT_IN.read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(lines[at]))] * 2)))
        new = data.draw(st.sampled_from(["", "  ", "\t", ": ", "- ", "[", "}", "'", "5", "null", "*x", "=", "steps", "\n"]))
        lines[at] = lines[at][:start] + new + lines[at][end:]
    with suppress(DefinitionFileError):
        parse("\n".join(lines).encode(), "f.yaml")


def test_a_workflow_whose_steps_are_all_wrong_has_steps() -> None:
    """Only what is wrong with them is said."""
    assert problems("name: w\nsteps: {a: {transform: 1, when: true}}") == [
        "f.yaml:2:27: steps.a.when: must be a valid string, not `True`"
    ]


NESTED = """\
name: agent
input: {type: object, properties: {ticker: {type: string}, rows: {type: array, items: {type: string}}}}
steps:
  agent:
    repeat:
      until: last.done
      at_most: five
    steps:
      think:
        llm:
          promt: hi
      act:
        needs: [think]
        switch:
          search:
            when: steps.think.outptu == 'x'
            tool: {name: echo, argumnts: {}}
          other:
            needs: [search]
            transform: 1
      lost: {transform: =steps.act.output}
  map:
    for_each: {items: =input.rows, tolerate: -1, as: row}
    transform: =row.name
  a: {needs: [b], transform: 1}
  b: {needs: [a], transform: 1}
  listed:
    steps:
      - name: one
        transform: =input.tickr
      - name: two
        needs: [one]
        switch:
          - {name: x, when: steps.one.status == 'complet', transform: 1}
          - {name: y, transform: 1, colour: 1}
  number:
    steps: 5
  renamed:
    steps: {x: {name: y, transform: 1}}
compensations:
  undo: {tol: {name: x}}
finally:
  tidy: {transform: =outcom}
  last: {llm: {prompt: "{{ input.tikker }}"}}
"""


def test_problems_of_steps_in_steps_have_their_places_too() -> None:
    """Steps of steps, cases, compensations and clean-up steps, whether they stand by name or in a list; all at once."""
    found = problems(NESTED)
    assert [each.split("; there are")[0] for each in found] == [
        "f.yaml:7:7: steps.agent.repeat.at_most: must be a valid integer, unable to parse string as an integer, not `five`",
        "f.yaml:10:9: steps.agent.steps.think.llm: `prompt` is missing",
        "f.yaml:11:11: steps.agent.steps.think.llm: unknown key `promt`; did you mean `prompt`?",
        "f.yaml:17:32: steps.agent.steps.act.switch.search.tool: unknown key `argumnts`; did you mean `arguments`?",
        "f.yaml:19:13: steps.agent.steps.act.switch.other.needs: the cases of a switch can't need each other",
        "f.yaml:21:7: steps.agent.steps.lost: names steps.act but doesn't need it; add it to `needs`",
        "f.yaml:23:36: steps.map.for_each.tolerate: must be greater than or equal to 0 or be 'all', not `-1`",
        "f.yaml:25:7: steps.a.needs: these steps need each other: a → b → a",
        "f.yaml:30:9: steps.listed.steps[0].transform: `input` has no `tickr`; did you mean `ticker`?",
        "f.yaml:34:23: steps.listed.steps[1].switch[0].when: `steps.one.status` is never 'complet'; did you mean `completed`?",
        "f.yaml:35:37: steps.listed.steps[1].switch[1]: unknown key `colour`",
        "f.yaml:37:5: steps.number.steps: must be a mapping by name, not `5`",
        "f.yaml:39:13: steps.renamed.steps.x: its name is its key, but this one is named `y` inside",
        "f.yaml:41:10: compensations.undo: unknown key `tol`; did you mean `tool`?",
        "f.yaml:43:3: finally.tidy: `outcom`: `outcom` is not defined; did you mean `outcome`?",
        "f.yaml:44:16: finally.last.llm.prompt: `input` has no `tikker`; did you mean `ticker`?",
    ]


def test_nothing_is_said_about_what_stands_for_a_mistake() -> None:
    """Of the output of a wrong step nothing is known, so what others do with it is no mistake of theirs."""
    text = step("tool: {nam: t}") + (
        "  b:\n    needs: [a]\n    when: steps.a.output.rows[0].x > 1\n    transform: =steps.a.output.text + 'x'\n"
        "  c: {when: 5, transform: 1}\n  d: {for_each: {itms: 5, as: one}, transform: =one.x}\n"
    )
    assert problems(text) == [
        "f.yaml:5:5: steps.a.tool: `name` is missing",
        "f.yaml:5:12: steps.a.tool: unknown key `nam`; did you mean `name`?",
        "f.yaml:10:7: steps.c.when: must be a valid string, not `5`",
        "f.yaml:11:7: steps.d.for_each: `items` is missing",
        "f.yaml:11:18: steps.d.for_each: unknown key `itms`; did you mean `items`?",
    ]


def test_a_file_is_checked_and_a_registered_version_is_not() -> None:
    """What the checker finds refuses a file; the same definition, registered once, can always be read."""
    text = "name: w\ninput: {properties: {a: {type: string}}}\nsteps:\n  x:\n    transform:\n      y: =input.b\n"
    assert problems(text) == ["f.yaml:6:7: steps.x.transform.y: `input` has no `b`; there is `a`"]
    old = '{"input":{"properties":{"a":{"type":"string"}}},"name":"w","steps":[{"name":"x","transform":{"y":"=input.b"}}]}'
    assert from_canonical(old).steps[0].transform == {"y": "=input.b"}


def test_tools_are_checked_when_they_are_known() -> None:
    """With the place of the call, of the argument, of the part of an argument."""
    tools = {
        "echo": ToolSchema(
            {
                "type": "object",
                "required": ["value"],
                "additionalProperties": False,
                "properties": {"value": {"type": "array", "items": {"type": "integer"}}},
            },
            {"type": "object", "properties": {"text": {"type": "string"}}},
        )
    }
    text = """\
name: w
steps:
  a: {tool: {name: ecko}}
  b: {tool: {name: echo}}
  c: {tool: {name: echo, arguments: {valeu: 1}}}
  d: {tool: {name: echo, arguments: {value: [1, x]}}}
  e: {needs: [d], transform: =steps.d.output.txt}
"""
    assert parse(text.encode(), "f.yaml").name == "w"
    with pytest.raises(DefinitionFileError) as caught:
        parse(text.encode(), "f.yaml", tools)
    assert [str(each) for each in caught.value.problems] == [
        "f.yaml:3:14: steps.a.tool.name: there is no tool `ecko`; did you mean `echo`?",
        "f.yaml:4:7: steps.b.tool: `echo` needs the argument `value`",
        "f.yaml:5:26: steps.c.tool.arguments: `echo` needs the argument `value`",
        "f.yaml:5:38: steps.c.tool.arguments.valeu: `echo` takes no argument `valeu`; did you mean `value`?",
        "f.yaml:6:49: steps.d.tool.arguments.value[1]: 'x' is not of type 'integer'",
        "f.yaml:7:19: steps.e.transform: `steps.d.output` has no `txt`; did you mean `text`?",
    ]
