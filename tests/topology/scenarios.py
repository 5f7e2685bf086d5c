"""The workflows and requests that the ledger's properties are tried on: small, but with every kind of thing that can happen."""

from dataclasses import replace
from typing import Any

from memory import Said
from schedules import Setup

from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    Origin,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    SignalReceived,
    StartRun,
)
from events.ids import run_id as run_id_of
from streams.workflow.expressions import to_json
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


# --- A schedule for owners that emit all again ---

START = ("A fetches", "A reads the snapshots", "A reads the index", "A reads the log")
ONLY = {request.workflow: replace(ONE, requests=(request,), owners=1) for request in ONE.requests}

ALL_AGAIN = {
    "the mark stays behind runs that inputs after the position finished": (
        "fails",
        # For owners that emit again whatever follows. Decisions on inputs 1 and 2 are in the log, and 2 ends the run; the call
        # that 1 led to is lost. The next owner commits position 1, then ends. If its mark passes the run, the third owner never
        # sees that decision again. (Rule 8.)
        (
            *("ask fails", *START, "A takes", "A's decision", "A's record", "A's record", "first", "bad", "A takes", "A takes"),
            *("A's decision", "A's decision", "A vanishes", *START, "A takes", "A's record", "A's record", "A settles"),
            *("A commits", "A crashes"),
        ),
    ),
}


# --- Runs of runs ---


def flow(name: str, steps: dict[str, Any], **rest: Any) -> WorkflowSpec:
    """Return a workflow."""
    return WorkflowSpec.model_validate({"name": name, "steps": steps, **rest})


def echo(version: int, **rest: Any) -> dict[str, Any]:
    """Return a step that calls a tool."""
    return {"tool": {"name": "echo", "arguments": {"version": version}}, **rest}


def child(version: int = 1) -> WorkflowSpec:
    """Return what another run starts: one call, and what it was given as well as what it made of it."""
    output = {"given": "=input", "version": version, "times": "=steps.work.output.times"}
    return flow("child", {"work": echo(version)}, output=output)


def waiting(version: int = 1) -> WorkflowSpec:
    """Return what another run starts, and what ends only when somebody answers or it is cancelled; it cleans up."""
    ask = {"approval": {"message": f"Go on, {version}?"}}
    return flow("waiting", {"ask": ask}, output={"given": "=input"}, **{"finally": {"tidy": echo(version)}})


def failing(version: int = 1) -> WorkflowSpec:
    """Return what another run starts, and what fails at its first attempt in one version of the code."""
    flaky = {"tool": {"name": "flaky", "arguments": {"version": version}}, "retry": {"attempts": version}}
    return flow("failing", {"work": flaky}, output={"given": "=input"})


def started(workflow: str, given: Any, *, detached: bool = False, **rest: Any) -> dict[str, Any]:
    """Return a step that starts another run."""
    return {"run": {"workflow": workflow, "input": {"given": given}, "detached": detached}, **rest}


def attached(version: int = 1) -> WorkflowSpec:
    """Return a run that waits for one child."""
    return flow("attached", {"one": started("child", version)})


def parent(version: int = 1) -> WorkflowSpec:
    """Return a run with children of each kind: one that is waited for, one for a time only, one that nobody may start."""
    steps = {
        "one": started("child", version, on_failure="continue"),
        "slow": started("waiting", version, time_limit="20s", on_failure="continue"),
        "again": started("failing", version, on_failure="continue", retry={"attempts": 2, "kinds": ["child_failed"]}),
        "nowhere": started("nowhere", version, on_failure="continue"),
        "all": {"transform": "=[steps.one.status, steps.slow.status, steps.nowhere.status]", "needs": ["one", "slow", "nowhere"]},
    }
    return flow("parent", steps)


def loosely(version: int = 1) -> WorkflowSpec:
    """Return a run that starts one that goes on by itself, and fails while it waits for another one."""
    steps = {
        "away": started("child", version, detached=True),
        "slow": started("waiting", version),
        "bad": {"tool": {"name": "flaky", "arguments": {"version": version}}, "retry": {"attempts": 1}, "needs": ["away"]},
    }
    return flow("loosely", steps)


def grand(version: int = 1) -> WorkflowSpec:
    """Return a run whose child has a child that waits for people."""
    return flow("grand", {"middle": started("middle", version)})


def middle(version: int = 1) -> WorkflowSpec:
    """Return a run between two others."""
    return flow("middle", {"inner": started("waiting", version)}, output={"given": "=input"})


# --- Loops, blocks, payloads ---


def loops(version: int = 1) -> WorkflowSpec:
    """Return items at once and in turn, cases, steps in steps, and values that are kept elsewhere."""
    item = {"tool": {"name": "echo", "arguments": {"x": "=item", "index": "=index", "shared": "=steps.large.output.asked.text"}}}
    again = {"tool": {"name": "echo", "arguments": {"n": "=index", "last": "=last.asked.n"}}}
    steps = {
        "large": {"tool": {"name": "large", "arguments": {"text": "x" * 1100, "version": version}}},
        "many": {**item, "for_each": {"items": [3, 1, 2], "concurrency": 2, "tolerate": 1}, "needs": ["large"]},
        "again": {
            "tool": again["tool"] | {"arguments": {"n": "=index"}},
            "repeat": {"until": "last.asked.n >= 1", "at_most": 3},
        },
        "choice": {
            "switch": {
                "no": {"when": "input.x > 5", **echo(version)},
                "yes": {"steps": {"a": echo(version), "b": {"transform": "=steps.a.output.times", "needs": ["a"]}}},
            },
            "needs": ["again"],
        },
        "block": {
            "steps": {
                "each": {
                    "for_each": {"items": ["p", "q"], "as": "letter"},
                    "steps": {"inside": {"tool": {"name": "flaky", "arguments": {"l": "=letter"}}, "retry": {"initial": "1s"}}},
                },
            },
            "time_limit": "50s",
            "on_failure": "continue",
        },
    }
    return flow("loops", steps, output={"many": "=steps.many.output", "size": "=size(steps.many.output)"})


# --- People and time ---


def people(version: int = 1) -> WorkflowSpec:
    """Return signals, approvals and sleeps."""
    steps = {
        "nap": {"sleep": "5s"},
        "told": {"wait_for": {"signal": "go", "correlation": "=input.k", "timeout": "30s", "otherwise": version}},
        "heard": {"wait_for": {"signal": "go"}},
        "sure": {
            "approval": {
                "message": f"Sure, {version}?",
                "show": "=steps.told.output",
                "by": ["ann"],
                "editable": True,
                "on_reject": "continue",
            },
            "needs": ["told"],
        },
        "soon": {
            "approval": {"message": "Soon?", "deadline": "10s", "otherwise": "reject", "on_reject": "continue"},
            "needs": ["nap"],
        },
        "last": echo(version, needs=["nap", "sure"]),
    }
    return flow("people", steps)


def until(version: int = 1) -> WorkflowSpec:
    """Return a run that its time limit ends."""
    steps = {"long": {"sleep": "1h"}, "call": echo(version), "never": {"wait_for": {"signal": "never"}}}
    return flow("until", steps, time_limit="40s")


# --- What is undone, and cleaned up ---


def undone(version: int = 1) -> WorkflowSpec:
    """Return what is undone when a later step fails, by a call and by a run, and what is cleaned up."""
    steps = {
        "book": echo(version, compensation="cancel"),
        "trip": started("child", version, compensation="return"),
        "each": {"for_each": {"items": [1, 2], "concurrency": 1}, **echo(version), "compensation": "cancel"},
        "bad": {
            "tool": {"name": "flaky", "arguments": {"version": version}},
            "retry": {"attempts": 1},
            "needs": ["book", "trip"],
        },
    }
    compensations = {
        "cancel": {"tool": {"name": "echo", "arguments": {"was": "=output.times", "version": version}}},
        "return": {"run": {"workflow": "waiting", "input": {"given": version}}},
    }
    tidy = {"tidy": echo(version, when="outcome != 'completed'"), "after": started("child", version, needs=["tidy"])}
    return flow("undone", steps, compensations=compensations, **{"finally": tidy})


MAKERS = (child, waiting, failing, attached, parent, loosely, grand, middle, loops, people, until, undone)


def said(*workflows: str) -> tuple[Said, ...]:
    """Return what people may say to runs of these workflows."""
    steps = {"people": "sure", "loops": "many", "undone": "trip", "parent": "slow", "loosely": "slow", "grand": "middle"}
    found = []
    for name in workflows:
        step = steps.get(name, "ask")
        found += [
            Said(name, "cancel", CancelRun("ann", "enough", force=False)),
            Said(name, "cancel", CancelRun("ann", "at once", force=True)),
            Said(name, "cancel", CancelStep(step, "ann", "not that")),
            Said(name, "hold", PauseRun("ann", "wait")),
            Said(name, "hold", ResumeRun("ann", single=False)),
            Said(name, "hold", ResumeRun("ann", single=True)),
            Said(name, "hold", PauseStep(step, "ann", "wait here")),
            Said(name, "hold", ResumeStep(step, "ann")),
            Said(name, "change", ChangeOutput(step, '{"given":0}', "ann", "better")),
            Said(name, "change", ChangeOutput("nowhere", "0", "ann", "worse")),
        ]
    return tuple(found)


TALK = (
    Said("people", "talk", SignalReceived("s1", "go", "k", '"one"', "bob")),
    Said("people", "talk", SignalReceived("s2", "go", None, '"two"', "bob")),
    Said("people", "talk", SignalReceived("s3", "stop", None, '"three"', "bob")),
    Said("people", "talk", ApprovalAnswered("sure", True, "bob", "not for him to say", None)),
    Said("people", "talk", ApprovalAnswered("sure", True, "ann", "", '"edited"')),
    Said("people", "talk", ApprovalAnswered("sure", False, "ann", "no", None)),
    Said("people", "talk", ApprovalAnswered("soon", False, "bob", "", "1")),
    Said("waiting", "talk", ApprovalAnswered("ask", False, "ann", "no", None)),
    Said("waiting", "talk", ApprovalAnswered("ask", True, "ann", "", None)),
)


def versions(*numbers: int) -> tuple[tuple[WorkflowSpec, ...], ...]:
    """Return the workflows as each version of the code understands them."""
    return tuple(tuple(make(number) for make in MAKERS) for number in numbers)


def asks(*workflows: str) -> tuple[StartRun, ...]:
    """Return a request for each workflow, and one for a fork of `loops`."""
    specs = {spec.name: spec for spec in versions(1)[0]}
    found = [StartRun(f"ask {name}", name, specs[name].digest, '{"k":"k","x":1}') for name in workflows]
    if "loops" in workflows:
        copied = {
            "large": {"status": "completed", "output": '{"asked":{"text":"short"},"times":1}'},
            "again": {"status": "failed", "error": {"kind": "loop_bound", "message": "as before"}},
        }
        fork = replace(found[workflows.index("loops")], request_id="ask fork", origin=Origin("another run", 3, "ab"))
        found.append(replace(fork, copied=to_json(copied), break_at=("choice", "many")))
    return tuple(found)


def family(*workflows: str, also: tuple[str, ...] = (), talk: tuple[Said, ...] = ()) -> tuple[Setup, Setup]:
    """Return setups of these workflows, with one version of the code and with two. `also`: runs that people speak to."""
    one = Setup(versions(1), asks(*workflows), says=(*said(*workflows, *also), *talk))
    return one, replace(one, versions=versions(1, 2))


CHILDREN = family("attached", "parent", "loosely", "grand", also=("child", "waiting", "middle"), talk=TALK[-2:])
LOOPS = family("loops")
PEOPLE = family("people", "until", talk=TALK[:-2])
UNDONE = family("undone", also=("waiting",), talk=TALK[-2:])
FAMILIES = {"children": CHILDREN, "loops": LOOPS, "people": PEOPLE, "undone": UNDONE}


# --- Schedules that once ended badly, for one owner: setup and moves ---

END = (Said("grand", "talk", CancelRun("ann", "enough", force=False)),)
GRAND = replace(CHILDREN[0], requests=asks("grand"), says=END, owners=1)
STARTS_AFTER_ITS_END = (
    # A has settled the start and the end of a child's parent; the child's start and its end, which follow, are on their way when
    # A ends. The next owner asks for the child's end, then the former one's request for its start comes.
    *("ask grand", *START, "A takes", "A's decision", "CancelRun 0", "A takes", "A's decision", "A settles", "A crashes"),
    *(*START, "A takes", "A takes", "A's record for requests", "intake", "a loose record for requests", "loose records are lost"),
)

# --- Schedules with packs of the index of finished runs ---


def finishing(request: str) -> tuple[str, ...]:
    """Return the moves in which A starts and ends a run of one call, and settles."""
    call = f"only of {run_id_of(request)[:4]}"
    return f"{request} is asked", "A takes", "A's decision", "A's record", call, "A takes", "A's decision", "A settles"


# Three runs, one after the other; the pack that holds the first one is deleted, the next one never lands.
THREE = replace(ONLY["single"], requests=tuple(replace(ONLY["single"].requests[0], request_id=name) for name in "xyz"), pack_at=1)
THIRD_PACK_LOST = (
    *(*START, *finishing("x"), "A's record", "A's record", "A commits"),
    *(*finishing("y"), "A's deletion", "A's record", "A's record", "A commits"),
    *(*finishing("z"), "A's deletion", "A vanishes", *START, "x is asked", "A takes", "A takes", "A takes", "A's decision"),
)
# B took over when `w` waited on the shelf. A ends `w`, indexes it and deletes its snapshot; then B, which has not come to that,
# packs the index.
WAITING = flow("waits", {"wait": {"wait_for": {"signal": "go"}}})
BOTH = Setup(
    ((single(), WAITING),),
    (replace(ONLY["single"].requests[0], request_id="x"), StartRun("w", "waits", WAITING.digest, "{}")),
    says=(Said("waits", "talk", CancelRun("ann", "enough", force=False)),),
    idle_ms=0,
    pack_at=1,
)
PACKED_BLINDLY = (
    *(*START, "w is asked", "A takes", "A's decision", "A settles", "A's record", "A commits"),
    *("x is asked", "A takes", "A's decision", "A's record", *(move.replace("A", "B", 1) for move in START)),
    *("B takes", "B's record", f"only of {run_id_of('x')[:4]}", "A takes", "A's decision"),
    *("B takes", "B's decision", "CancelRun", "A takes", "A's decision", "A settles", "A's record", "A's record", "A's record"),
    *("A commits", "x is asked", "A takes", "A settles", "A's deletion for snapshots", "A commits"),
    *("B settles", "B's record", "B's record", "B commits"),
)

HISTORIES = {
    "a finished run is asked for again": (
        ONLY["single"],
        # The second StartRun comes when the run is over: it must have no effect. (It once started the run anew.)
        (
            *("ask single", *START, "A takes", "A's decision", "A's record", "only", "A takes", "A's decision", "ask single"),
            "A takes",
        ),
    ),
    # (It once went on for ever: the end came before the start.)
    "a child's start comes again after its end was asked for": (GRAND, STARTS_AFTER_ITS_END),
}
