"""The work that is measured: six sequential, trivial, durable steps a run, each echoing a small dict."""

from typing import Any, Final

from streams.workflow.spec import WorkflowSpec

_CALL: Final[dict[str, Any]] = {"tool": {"name": "echo", "arguments": {"value": "=index"}}}
SIX_STEPS: Final = "bench-six-steps"
STEPS: Final = ("plan", "fetch_prices", "fetch_news", "analyse", "critique", "report")


def six_steps() -> WorkflowSpec:
    """Return the workflow: each step is a call of the tool `echo` whose arguments come from the step before.

    Its output is what the last step gave, so that who asked can see that all six were done.
    """
    steps: dict[str, Any] = {}
    before = "input"
    for name in STEPS:
        value = {"step": name, "ticker": "ACME", "i": f"={before}.i", "text": "x" * 64}
        needs = [] if before == "input" else [before.split(".")[1]]
        steps[name] = {"tool": {"name": "echo", "arguments": {"value": value}}, "needs": needs}
        before = f"steps.{name}.output"
    return WorkflowSpec.model_validate({"name": SIX_STEPS, "input": {"type": "object"}, "steps": steps, "output": f"={before}"})


def loop(times: int) -> WorkflowSpec:
    """Return a run of so many calls, one after the other."""
    step = {"repeat": {"until": f"index == {times - 1}", "at_most": times}} | _CALL
    return WorkflowSpec.model_validate({"name": f"bench-loop-{times}", "steps": {"a": step}, "output": "=steps.a.output"})


def fan_out(concurrency: int) -> WorkflowSpec:
    """Return a run with a call for each item of its input, so many at a time."""
    step = {"for_each": {"items": "=input.items", "concurrency": concurrency}} | _CALL
    return WorkflowSpec.model_validate({"name": "bench-fan-out", "steps": {"a": step}, "output": "=size(steps.a.output)"})
