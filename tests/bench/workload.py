"""The work that is measured: six sequential, trivial, durable steps a run, each echoing a small dict."""

from typing import Any, Final

from streams.workflow.spec import WorkflowSpec

STEPS: Final = ("plan", "fetch_prices", "fetch_news", "analyse", "critique", "report")


def six_steps() -> WorkflowSpec:
    """Return the workflow: each step is a call of the tool `echo` whose arguments come from the step before."""
    steps: dict[str, Any] = {}
    before = "input"
    for name in STEPS:
        value = {"step": name, "ticker": "ACME", "i": f"={before}.i", "text": "x" * 64}
        needs = [] if before == "input" else [before.split(".")[1]]
        steps[name] = {"tool": {"name": "echo", "arguments": {"value": value}}, "needs": needs}
        before = f"steps.{name}.output"
    return WorkflowSpec.model_validate({"name": "bench-six-steps", "input": {"type": "object"}, "steps": steps})
