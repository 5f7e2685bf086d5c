"""`given` a workflow, `when` something happens: a run in memory."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from events.commands import (
    ApprovalAnswered,
    CancelRun,
    CancelStep,
    ChangeOutput,
    PauseRun,
    PauseStep,
    ResumeRun,
    ResumeStep,
    SignalReceived,
    WorkflowRequest,
)
from events.decisions import ApprovalRequested
from events.results import Input
from streams.testing import histories
from streams.testing.script import Script, UnscriptedCallError
from streams.testing.then import Then
from streams.testing.world import Sent, World
from streams.workflow.definition import load
from streams.workflow.expressions import Json, to_json
from streams.workflow.fork import fork
from streams.workflow.payloads import inlined
from streams.workflow.spec import WorkflowSpec
from streams.workflow.state import StepStatus
from streams.workflow.times import instant, milliseconds

__tracebackhide__ = True  # pytest shows the test's line, not these
_AS_SHOWN: Final = object()
_TESTER: Final = "tester"
Definition = str | Path | Mapping[str, Any] | WorkflowSpec


def given(  # noqa: PLR0913 - all but the workflow by name
    workflow: Definition,
    *,
    input: Json = None,  # noqa: A002 - the word that definitions and requests use
    tools: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    runs: Mapping[str, Any] | None = None,
    at: str | int = "2026-01-01T00:00:00Z",
    break_at: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    request_id: str = "test",
    artifacts: Path | None = None,
) -> "Run":
    """Start a run in memory, and let it go as far as it goes without time, signals and people.

    `workflow`: a YAML file, a definition, or what a YAML file holds. `tools`, `models` and `runs` say what is answered:

    - `tools`: by the tool's name, a value; a function that is called with the arguments, sync or async, which may raise
      `RetryableError` and `TerminalError`; or a `Tool`, so `tools.registry.load()` brings the real ones.
    - `models`: by the step's path without numbers (`agent.think`), or `*` for all others: a text; any other JSON value, which is
      said as JSON; or a function of the messages and the call. Answers are checked against the step's schema.
    - `runs`: by the workflow's name, an output; a function of the input; or a definition (a `WorkflowSpec`, or a file's `Path`),
      which is really run.

    Each may also be a `Failure`, `NEVER`, `answer(…)` with more details, or `answers(…)`, one for each call. `at` is when it
    starts, `artifacts` the folder for tools that write files (else a temporary one). The same request id gives the same history.

    Raises DefinitionFileError, ValueError for an input that intake would refuse, and UnscriptedCallError for a call of which
    nothing is said.

        run = given("send.yaml", input={"to": "x"}, tools={"mail": {"sent": True}}, models={"write": "Dear x"})
        run.then_waits_for(approval="release")
        run.when_approved(by="ann").then_completed(partly(sent=True)).then_called("mail", arguments=partly(to="x"))
    """
    script = Script(tools or {}, models or {}, runs or {}, artifacts)
    world = World(script, at if isinstance(at, int) else instant(at))
    request = WorkflowRequest("", to_json({} if input is None else input), request_id, None, labels or {}, None, tuple(break_at))
    return _started(world, request, _spec(workflow))


def _started(world: World, request: WorkflowRequest, spec: WorkflowSpec) -> "Run":
    run = Run(world, world.start(request, spec))
    run._play()  # noqa: SLF001 - its own
    return run


class Run(Then):
    """A run in a test: `when_…` lets something happen and returns the run, `then_…` checks what came of it."""

    def __init__(self, world: World, run_id: str) -> None:
        super().__init__(world, run_id)
        self._signals = self._forks = 0

    def when_input(self, said: Input) -> Self:
        """Let anything come in that may stand in the run's inbox."""
        self._since = len(self._run.events)
        self._world.send(Sent(self._id, said))
        return self._play()

    def when_time_passes(self, time: str | int | None = None) -> Self:
        """Let so much time pass (`3d`, or milliseconds); what is due happens at its time. Without one: until something is due."""
        self._since = len(self._run.events)
        until = self._world.next_time() if time is None else self.now + int(milliseconds(time))
        return self._play(self.now if until is None else until)

    def when_signal(
        self, name: str, payload: Json = None, *, correlation: str | None = None, by: str = _TESTER, signal_id: str | None = None
    ) -> Self:
        """Send a signal. The same `signal_id` counts once; without one it is a new signal."""
        self._signals += 1
        identity = signal_id if signal_id is not None else f"signal {self._signals}"
        return self.when_input(SignalReceived(identity, name, correlation, self._text(payload), by))

    def when_approved(self, step: str | None = None, *, by: str | None = None, value: Json = _AS_SHOWN, reason: str = "") -> Self:
        """Approve what a step shows, or `value` instead. Without `step`: the only approval that is awaited.

        Without `by`, the first of those who may. Raises AssertionError without `step` if not exactly one approval is awaited.
        """
        path, who = self._awaited(step, by)
        text = None if value is _AS_SHOWN else self._text(value)
        return self.when_input(ApprovalAnswered(path, True, who, reason, text))

    def when_rejected(self, step: str | None = None, *, by: str | None = None, reason: str = "") -> Self:
        """Reject what a step shows; otherwise as `when_approved`."""
        path, who = self._awaited(step, by)
        return self.when_input(ApprovalAnswered(path, False, who, reason, None))

    def when_cancelled(self, reason: str = "", *, by: str = _TESTER, step: str | None = None, force: bool = False) -> Self:
        """Cancel the run, or a step of it. `force`: without undoing anything."""
        return self.when_input(CancelRun(by, reason, force) if step is None else CancelStep(step, by, reason))

    def when_paused(self, step: str | None = None, *, by: str = _TESTER, reason: str = "") -> Self:
        """Pause the run, or stop it before a step."""
        return self.when_input(PauseRun(by, reason) if step is None else PauseStep(step, by, reason))

    def when_resumed(self, step: str | None = None, *, by: str = _TESTER, single: bool = False) -> Self:
        """Go on with all that is held, or with one step. `single`: and hold what comes next."""
        return self.when_input(ResumeRun(by, single) if step is None else ResumeStep(step, by))

    def when_output_changed(self, step: str, output: Json, *, by: str = _TESTER, reason: str = "") -> Self:
        """Replace a step's output."""
        return self.when_input(ChangeOutput(step, self._text(output), by, reason))

    def child(self, step: str) -> "Run":
        """Return the run that a step started last, if its workflow is really run. Raises AssertionError if there is none."""
        if step not in self._run.children:
            self._fail(f"step {step} has started no run that is really run", list(self._run.children), "steps that have")
        return Run(self._world, self._run.children[step])

    def forked(
        self,
        *,
        rerun: Collection[str] = (),
        outputs: Mapping[str, Json] | None = None,
        input: Json = _AS_SHOWN,  # noqa: A002 - the word that definitions and requests use
        spec: Definition | None = None,
    ) -> "Run":
        """Return another run that begins with this one's results: only what is changed, and what depends on it, runs again.

        `rerun`: steps that run again; `outputs`: other outputs of steps; `input`: another input; `spec`: another version of the
        workflow. What calls answer goes on where this run left it, the clock too; this run stays as it is.

        Raises DefinitionError for a step that there isn't, UndoneError for one that was undone and is neither in `rerun` nor in
        `outputs`, and what `given` raises.
        """
        self._forks += 1
        version = self._run.spec if spec is None else _spec(spec)
        texts = {path: self._text(output) for path, output in (outputs or {}).items()}
        text = None if input is _AS_SHOWN else to_json(input)
        identity = f"{self._run.id} fork {self._forks}"
        request = fork(self._id, self.state, version, rerun=rerun, outputs=texts, input_text=text, request_id=identity)
        return _started(World(self._world.script, self.now), request, version)

    def save(self, path: str | Path) -> None:
        """Write the run's history to a file that `replay` and `foldflow replay` check. It holds all the run's data."""
        run = self._run
        histories.write(Path(path), histories.Recorded(run.id, run.spec, tuple(run.values)), self._world.script.payloads)

    # --- How that is done ---

    def _play(self, until: int | None = None) -> Self:
        try:
            self._world.pass_until(self.now if until is None else until)
        except UnscriptedCallError as error:
            raise UnscriptedCallError(f"{error}\n\n{self.timeline}") from None
        return self

    def _text(self, value: Json) -> str:
        return inlined(to_json(value), self._world.script.payloads)

    def _awaited(self, step: str | None, by: str | None) -> tuple[str, str]:
        """Return the approval that is meant, and who answers it."""
        steps = {path: each for path, each in self.state.steps.items() if each.status is StepStatus.AWAITING_APPROVAL}
        if step is None and len(steps) != 1:
            self._fail(
                f"{len(steps)} approvals are awaited: say which step" if steps else "no approval is awaited",
                sorted(steps),
                "awaited",
            )
        path = step if step is not None else next(iter(steps))
        asked = steps[path].asked if path in steps else None
        may = asked.by if isinstance(asked, ApprovalRequested) else ()
        return path, by if by is not None else next(iter(may), _TESTER)


def _spec(workflow: Definition) -> WorkflowSpec:
    if isinstance(workflow, WorkflowSpec):
        return workflow
    return WorkflowSpec.model_validate(workflow) if isinstance(workflow, Mapping) else load(Path(workflow))


__all__ = ["Definition", "Run", "given"]
