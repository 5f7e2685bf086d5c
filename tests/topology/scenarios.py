"""The workflows and requests that the ledger's properties are tried on: small, but with every kind of thing that can happen."""

from dataclasses import replace

from memory import Setup

from events.commands import StartRun
from streams.workflow.spec import WorkflowSpec


def single(version: int = 1) -> WorkflowSpec:
    """Return one call and its answer."""
    return WorkflowSpec.model_validate(
        {"name": "single", "steps": {"only": {"tool": {"name": "echo", "arguments": {"version": version}}}}}
    )


def branches(version: int = 1) -> WorkflowSpec:
    """Return two branches, one of them conditional and with a second attempt, and a value made of both."""
    return WorkflowSpec.model_validate(
        {
            "name": "branches",
            "steps": {
                "left": {"tool": {"name": "echo", "arguments": {"version": version}}, "on_failure": "continue"},
                "right": {
                    "tool": {"name": "flaky", "arguments": {"v": version}},
                    "when": "input.right",
                    "retry": {"attempts": 2},
                },
                "ask": {"llm": {"prompt": "{{ steps.left.output.times }}"}, "needs": ["left"], "on_failure": "continue"},
                "both": {"transform": "=steps.right.status", "needs": ["left", "right"]},
            },
            "output": {"both": "=steps.both.output"},
        }
    )


def fails(version: int = 1) -> WorkflowSpec:
    """Return a run that fails while another of its calls is still out."""
    flaky = {"tool": {"name": "flaky", "arguments": {"version": version}}, "retry": {"attempts": 1}}
    after = {"tool": {"name": "echo", "arguments": {"version": version}}, "needs": ["first"]}
    first = {"tool": {"name": "echo", "arguments": {"version": version}}}
    return WorkflowSpec.model_validate({"name": "fails", "steps": {"first": first, "bad": flaky, "after": after}})


def requests() -> tuple[StartRun, ...]:
    """Return one request for each workflow."""
    inputs = {"single": "{}", "branches": '{"right":true}', "fails": "{}"}
    specs = (single(), branches(), fails())
    return tuple(StartRun(f"ask {spec.name}", spec.name, spec.digest, inputs[spec.name]) for spec in specs)


ONE = Setup(((single(), branches(), fails()),), requests())
TWO = Setup(((single(1), branches(1), fails(1)), (single(2), branches(2), fails(2))), requests())


# --- Schedules that once ended badly, for one owner: workflow and moves ---

START = ("A fetches", "A reads the index", "A reads the log")
ONLY = {request.workflow: replace(ONE, requests=(request,), owners=1) for request in ONE.requests}

HISTORIES = {
    "a finished run is asked for again": (
        "single",
        # The second StartRun comes when the run is over: it must have no effect. (It once started the run anew.)
        (
            "ask single",
            *START,
            "A takes",
            "A's decision",
            "A's record",
            "only",
            "A takes",
            "A's decision",
            "ask single",
            "A takes",
        ),
    ),
}

ALL_AGAIN = {
    "the mark stays behind runs that inputs after the position finished": (
        "fails",
        # For owners that emit again whatever follows. Decisions on inputs 1 and 2 are in the log, and 2 ends the run; the call
        # that 1 led to is lost. The next owner commits position 1, then ends. If its mark passes the run, the third owner never
        # sees that decision again. (Rule 8.)
        (
            *("ask fails", *START, "A takes", "A's decision", "A's record", "A's record", "first", "bad", "A takes", "A takes"),
            *("A's decision", "A's decision", "A vanishes", *START, "A takes", "A's record", "A's record", "A settles"),
            *("A's record", "A commits", "A crashes"),
        ),
    ),
}
