"""Record the histories anew, after a change that is meant to change decisions: `python tests/histories/record.py`.

Each history is a run in memory by the testing kit; together they have every input and every effect of the catalogue. Their files
stand beside this one, with a few that `tests/unit/test_market_analysis.py` records. Look at what a new recording changes
(`git diff --stat tests/histories`) and say in the commit why open runs may go on another way.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from events.decisions import UnreadableInput  # noqa: E402 - the line above makes the checkout the one that is imported
from streams.testing import NEVER, Failure, Run, answers, given  # noqa: E402
from streams.workflow.definition import parse  # noqa: E402


def flow(text: str) -> Any:
    """Return the definition that a YAML text holds."""
    return parse(text.encode(), "history.yaml")


def calls() -> Run:
    """Record calls that fail, are tried again, take too long, are skipped; a model whose answer doesn't fit at first."""
    workflow = flow("""
name: calls
input: {type: object, properties: {page: {type: string}}}
steps:
  fetch: {tool: {name: fetch, arguments: {page: "=input.page"}}, retry: {attempts: 3, initial: 1s}, timeout: 10s}
  slow: {tool: {name: slow}, timeout: 2s, on_failure: continue}
  title:
    needs: [fetch]
    llm: {prompt: "Title of {{ steps.fetch.output }}", schema: {type: object, required: [title]}}
    retry: {attempts: 2, initial: 1s}
  never: {needs: [fetch], when: "size(steps.fetch.output) > 100", tool: {name: fetch, arguments: {}}}
  wait: {needs: [title, slow], sleep: 1h}
output: {title: "=steps.title.output.title", slow: "=steps.slow.status", never: "=steps.never.status"}
""")
    pages = answers(Failure("unavailable", "down"), Failure("rate_limited", "too often", 5_000), "a page")
    run = given(
        workflow,
        input={"page": "p-1"},
        tools={"fetch": pages, "slow": NEVER},
        models={"title": answers(Failure("unavailable", "no answer"), {"title": "Grüße"})},
        labels={"team": "a"},
    )
    run.when_time_passes("2h").then_completed({"title": "Grüße", "slow": "failed", "never": "skipped"})
    return run


def people() -> Run:
    """Record signals before and after their steps, an approval with another value, pauses, breakpoints, a set output."""
    workflow = flow("""
name: people
time_limit: 30d
steps:
  order: {wait_for: {signal: order}}
  paid: {needs: [order], wait_for: {signal: paid, correlation: "=steps.order.output.id", timeout: 2d}}
  fetch: {needs: [paid], tool: {name: fetch}}
  ok: {needs: [fetch], approval: {message: "Send?", show: "=steps.fetch.output", by: [ann], editable: true, deadline: 3d}}
  send: {needs: [ok], tool: {name: send, arguments: {what: "=steps.ok.output.value"}}}
""")
    run = given(workflow, tools={"fetch": "rows", "send": "sent"}, break_at=["fetch"])
    run.when_signal("paid", {"eur": 3}, correlation="o-1")
    run.when_signal("paid", {"eur": 3}, correlation="o-1", signal_id="signal 1")
    run.when_signal("order", {"id": "o-1"}).then_waits_for(held="fetch")
    run.when_resumed("fetch").then_waits_for(approval="ok")
    run.when_paused("send", reason="look first").when_paused(reason="lunch")
    run.when_output_changed("fetch", ["other", "rows"], reason="wrong rows")
    run.when_approved(by="eve").when_approved(by="ann", value="better rows")
    run.when_resumed().when_resumed("send", by="ann")
    run.then_completed("sent")
    return run


def steps_of_steps() -> Run:
    """Record a loop, items of which one fails, child runs that end well and don't, a step that is cancelled."""
    workflow = flow("""
name: steps-of-steps
steps:
  agent:
    repeat: {until: "last > 1", at_most: 4}
    steps:
      think: {tool: {name: count}}
      rest: {needs: [think], sleep: 1m}
    output: "=steps.think.output"
  many:
    for_each: {items: [1, 2, 3], as: x, concurrency: 2, tolerate: 1}
    tool: {name: some, arguments: {x: "=x"}}
  group:
    needs: [many]
    steps:
      child: {run: {workflow: child, input: {n: 1}}}
      odd: {run: {workflow: odd, input: {}}, on_failure: continue}
  endless: {tool: {name: endless}, on_failure: continue}
output: {agent: "=steps.agent.output", many: "=steps.many.output", endless: "=steps.endless.status"}
""")
    some = answers("one", Failure("tool_terminal", "no two"), "three")
    run = given(
        workflow,
        tools={"count": answers(1, 2), "some": some, "endless": NEVER},
        runs={"child": {"n": 2}, "odd": Failure("cancelled", "somebody ended it")},
    )
    run.when_cancelled("too long", step="endless").when_time_passes("1h")
    run.then_completed({"agent": 2, "many": ["one", None, "three"], "endless": "failed"})
    return run


def saga() -> Run:
    """Record that what is done is undone when somebody cancels; calls and child runs under way are given up."""
    workflow = flow("""
name: saga
compensations:
  refund: {tool: {name: refund, arguments: {id: "=output"}}}
steps:
  charge: {tool: {name: charge}, compensation: refund}
  ship: {needs: [charge], tool: {name: ship}}
  tell: {needs: [charge], run: {workflow: tell, input: {}}}
  asked: {needs: [charge], approval: {message: "Go on?"}}
finally:
  tidy: {tool: {name: tidy, arguments: {why: "=outcome"}}}
""")
    run = given(workflow, tools={"charge": "c-1", "ship": NEVER, "refund": {}, "tidy": {}}, runs={"tell": NEVER})
    run.when_cancelled("changed their mind", by="ann").then_cancelled(by="ann")
    return run


def failed() -> Run:
    """Record that an input that can't be read changes nothing; a failure ends the run, and its call under way is given up."""
    workflow = flow("""
name: failed
steps:
  pay: {tool: {name: pay}}
  beside: {tool: {name: beside}}
  last: {needs: [pay, beside], transform: 1}
""")
    run = given(workflow, tools={"pay": answers(NEVER), "beside": NEVER})
    run.when_input(UnreadableInput(3, "b5" * 32, "no Avro"))  # type: ignore[arg-type] - what the orchestrator says of one
    run.when_cancelled("no use", step="pay").then_failed("cancelled", step="pay")
    return run


def fork() -> Run:
    """Record a run with another one's result in it."""
    workflow = flow("""
name: fork
steps:
  fetch: {tool: {name: fetch}}
  write: {needs: [fetch], llm: {prompt: "Summarise {{ steps.fetch.output }}"}}
""")
    first = given(workflow, tools={"fetch": "a text"}, models={"write": answers("short", "shorter")})
    return first.then_completed("short").forked(rerun=["write"]).then_completed("shorter")  # type: ignore[return-value]


RUNS: Final[tuple[Callable[[], Run], ...]] = (calls, people, steps_of_steps, saga, failed, fork)


def record(folder: Path) -> list[Path]:
    """Run all of them and write their histories; return the files."""
    paths = []
    for make in RUNS:
        paths.append(folder / f"{make.__name__}.json")
        make().save(paths[-1])
    return paths


if __name__ == "__main__":
    print(*record(HERE), sep="\n")  # noqa: T201
