"""How a run goes on: every step that became ready is entered, until nothing more is, and then the run ends.

A step that settles frees those that need it, and may settle the step that it is part of. A step that fails takes what it is part
of with it, unless that is tolerated. Some of this happens at once (transforms, skipped steps, kept signals), the rest is asked
for.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Final

from events.decisions import (
    CallCancelled,
    ChildRunCancelled,
    ChildRunRequested,
    Effect,
    LoopAdvanced,
    MapStarted,
    RetryScheduled,
    RunCancelled,
    RunClosing,
    RunCompleted,
    RunFailed,
    StepCancelled,
    StepCompleted,
    StepCopied,
    StepFailed,
    StepHeld,
    StepSkipped,
    TimerSet,
    UndoPlanned,
)
from events.failure import Failure, FailureKind
from events.ids import run_id as run_id_of
from streams.workflow.expressions import EvaluationError
from streams.workflow.kinds import KINDS, call, joined
from streams.workflow.making import SHARED_BYTES, Making
from streams.workflow.payloads import PayloadTooDeepError, PayloadTooLargeError, resolve, utf8_size
from streams.workflow.plan import FINALLY, Frame, Place, StepPlan
from streams.workflow.scopes import listed
from streams.workflow.spec import Step
from streams.workflow.state import StepState, StepStatus, children, undo_path, undone, unnumbered

LONGEST_WAIT_MS: Final = 30 * 24 * 60 * 60 * 1000
"""Longest wait that a failure may ask for."""
UNCOMPUTABLE: Final = (EvaluationError, PayloadTooLargeError, PayloadTooDeepError)
"""What is wrong with a definition and its values. A payload that can't be had yet is not."""


class Advance(Making):
    """A decision in the making that goes on by itself."""

    # --- Frames: steps that stand together ---

    def advance(self, owner: Place | None, frame: Frame, candidates: Sequence[str]) -> None:
        """Enter every step that became ready, in the definition's order, until nothing more is; then settle their owner."""
        prefix = f"{owner.path}." if owner else ""
        queue = [frame.steps[name].index for name in candidates]
        heapq.heapify(queue)
        while queue and not self.halted(owner):
            plan = frame.steps[frame.order[heapq.heappop(queue)]]
            path = prefix + plan.name
            if path in self.state.steps or not all(self.settled(prefix + need) for need in plan.needs):
                continue
            self.enter(owner.inner(plan.name) if owner else Place(path, plan))
            if self.settled(path):
                for name in frame.dependents.get(plan.name, ()):
                    heapq.heappush(queue, frame.steps[name].index)
        if self.halted(owner):
            return
        if owner is None:
            if self.state.settled == len(frame.steps):
                self.complete_run()
        elif (step := self.step(owner.path)) and step.done == len(frame.steps):
            self.complete_block(owner, frame)

    def halted(self, owner: Place | None) -> bool:
        """Whether the steps of a step, or of the workflow, go no further."""
        if self.state.over:
            return True
        if owner is None:
            return self.state.closing is not None
        step = self.step(owner.path)
        return step is None or step.settled  # forgotten: what it was part of has ended

    def after(self, place: Place | None) -> None:
        """Go on with what waits for a step that has settled, then with what it is part of, as far as that settles too."""
        while place is not None and not self.state.over:
            if undone(place.path) is not None or place.plan is self.plan.final:
                self.close_on()
                return
            owner = place.owner()
            if owner is None:
                self.advance(None, self.plan.root, self.plan.root.dependents.get(place.plan.name, ()))
                return
            if not self.settled(owner.path):
                self.go_on(owner, place)
            place = self.outermost(owner)

    def go_on(self, owner: Place, place: Place) -> None:
        """Go on with a step, one of whose parts has settled."""
        if place.index is not None:
            self.next_part(owner)
        elif owner.plan.kind == "switch":
            self.complete(owner, source=place.path)
        else:
            assert owner.plan.frame is not None
            self.advance(owner, owner.plan.frame, owner.plan.frame.dependents.get(place.plan.name, ()))

    def outermost(self, place: Place) -> Place | None:
        """Return a step if it has settled, or what it was part of if that has, and it is forgotten; None: it is under way."""
        if self.step(place.path) is not None:
            return place if self.settled(place.path) else None
        owner = place.owner()
        return self.outermost(owner) if owner else None

    # --- One step ---

    def enter(self, place: Place, *, released: bool = False) -> None:
        """Begin a step that is ready: skip it, hold it, compute it or ask for what it needs."""
        if self.state.copied and place.path in self.state.copied:
            self.add(StepCopied(place.path))
        elif not released and (reason := self.hold(place)):
            self.add(StepHeld(place.path, 0, reason))
        else:
            self.guarded(place, lambda: self.begin(place))

    def guarded(self, place: Place, do: Callable[[], None]) -> None:
        """Do something; what expressions can't compute is the step's failure. A payload that can't be had yet is nobody's."""
        try:
            do()
        except UNCOMPUTABLE as error:
            self.fail(place, _uncomputable(error))

    def hold(self, place: Place) -> str:
        """Return why a step must not start now, "" if it may."""
        state = self.state
        if state.closing is not None:
            return ""
        if state.stops and (place.path in state.stops or (place.index is None and unnumbered(place.path) in state.stops)):
            return "breakpoint"
        return "paused" if state.paused else ""

    def begin(self, place: Place) -> None:
        """Begin a step that nothing holds. Raises EvaluationError, PayloadError."""
        plan, step = place.plan, place.plan.step
        assert isinstance(step, Step)
        if place.index is None and plan.when and not self.holds(place, plan.when):
            self.add(StepSkipped(place.path, plan.when.source))
        elif place.repeats:
            self.begin_parts(place, step)
        else:
            KINDS[plan.kind](self, place, step)

    def complete(
        self,
        place: Place,
        output: str | None = None,
        source: str | None = None,
        *,
        text: str | None = None,
        by: Effect | None = None,
    ) -> None:
        """Settle a step with its output; None: the one of the input, whose `text` it is. `by`: another effect than usual."""
        effect = by or StepCompleted(place.path, output, source)
        undo = place.plan.compensation if not place.repeats else None
        if undo is None:
            self.add(effect)
            return
        if source is not None and (inner := self.step(source)):
            text = inner.output
        value = output if output is not None else text or "null"
        assert undo.value is not None
        try:
            seen = Place(place.path, undo, place.around, place.index)
            arguments = self.evaluate(seen, undo.value, output=resolve(value, self.payloads))
        except UNCOMPUTABLE as error:
            failure = _uncomputable(error, "done, but how to undo it could not be computed: ")
            self.add(StepFailed(undo_path(place.path), failure, tolerated=True))
            self.fail(place, failure)
            return
        self.add(effect)
        self.add(UndoPlanned(place.path, undo.name, arguments))

    def fail(self, place: Place, failure: Failure, origin: str | None = None) -> Place | None:
        """Let a step fail for good, and what it is part of with it, as far as that isn't tolerated.

        Return the step where that ended; None: the run goes no further.
        """
        tolerated = self.tolerated(place)
        self.add(StepFailed(place.path, failure, tolerated))
        if tolerated:
            return place
        origin = origin or place.path
        owner = place.owner()
        if owner is None:
            if place.plan is self.plan.final:
                return place
            self.close(RunClosing("failed", step=origin, failure=failure))
            return None
        self.cancel_parts(owner, f"{origin} failed")
        return self.fail(owner, failure, origin)

    def tolerated(self, place: Place) -> bool:
        """Whether what a step is part of goes on without it."""
        step = place.plan.step
        if not isinstance(step, Step):
            return True  # what can't be undone is reported at the end
        if place.index is None:
            return step.on_failure == "continue"
        owner = place.owner()
        around = self.step(owner.path) if owner else None
        if step.for_each is None or around is None:
            return False
        return step.for_each.tolerate == "all" or around.failed < step.for_each.tolerate

    # --- Attempts: what leaves the process ---

    def attempt(self, place: Place, number: int, *, released: bool = False) -> None:
        """Request an attempt of a step's call, unless it is held."""
        if number > 1 and not released and (reason := self.hold(place)):
            self.add(StepHeld(place.path, number, reason))
            return

        def request() -> None:
            effect = call(self, place, number)
            if isinstance(effect, ChildRunRequested) and effect.detached:
                self.complete(place, "null", by=effect)
                return
            self.add(effect)
            self.requested.add(place.path)

        self.guarded(place, request)

    def limit(self, place: Place) -> int | None:
        """Return when a step's time limit is up; None: it has none."""
        step = place.plan.step
        if not isinstance(step, Step) or step.time_limit is None or (place.index is not None):
            return None
        before = self.step(place.path)
        return ((before.began if before else 0) or self.at) + step.time_limit

    def set_limit(self, place: Place) -> None:
        """Set the timer of a step's time limit, where nothing else has one."""
        limit = self.limit(place)
        if limit is not None:
            self.add(TimerSet(place.path, limit))

    def failed(self, place: Place, failure: Failure) -> Place | None:
        """Schedule another attempt of a call, or let its step fail for good. Return the step that settled by it, if any."""
        before, retry = self.step(place.path), place.plan.step.retry
        assert before is not None
        retryable = failure.retryable if retry.kinds is None else failure.kind in retry.kinds
        if retryable and before.attempt < retry.attempts:
            asked = failure.retry_after_ms
            wait = min(max(asked, 0), LONGEST_WAIT_MS) if asked is not None else _backoff(place.plan, before)
            due, limit = self.at + wait, self.limit(place)
            if (limit is None or due < limit) and (retry.within is None or due <= before.began + retry.within):
                self.add(RetryScheduled(place.path, before.attempt + 1, failure, due))
                return None
        return self.fail(place, failure)

    # --- Items and iterations ---

    def begin_parts(self, place: Place, step: Step) -> None:
        """Begin a step that is done more than once. Raises EvaluationError, PayloadError."""
        plan = place.plan
        if step.for_each:
            assert plan.items is not None
            items = self.evaluate(place, plan.items)
            total = len(listed(items, self.payloads))
            shared = {key: self.evaluate(place, part) for key, part in plan.shared.items()}
            shared = {key: self.payloads.put(text) if utf8_size(text) > SHARED_BYTES else text for key, text in shared.items()}
            self.add(MapStarted(place.path, total, items, joined("{}", shared) if shared else None))
            self.set_limit(place)
        else:
            self.add(LoopAdvanced(place.path, 0))
            self.set_limit(place)
            self.enter(place.item(0))
        self.next_part(place)

    def next_part(self, place: Place) -> None:
        """Begin as many items as may be under way, or the next iteration; settle the step when there are no more."""
        step = place.plan.step
        assert isinstance(step, Step)
        self.guarded(place, lambda: self.next_items(place, step) if step.for_each else self.next_iteration(place, step))

    def next_items(self, place: Place, step: Step) -> None:
        """Begin as many items as may be under way; settle the step when all are. Raises PayloadError."""
        assert step.for_each is not None
        now = self.step(place.path)
        while now is not None and not now.settled and not self.state.over:
            if now.done == now.total:
                outputs = (self.state.steps[f"{place.path}[{index}]"].output or "null" for index in range(now.total))
                self.complete(place, self.inlined(f"[{','.join(outputs)}]"))
                return
            if now.next == now.total or now.next - now.done >= step.for_each.concurrency:
                return
            if self.full:
                self.add(TimerSet(place.path, self.at))
                return
            self.enter(place.item(now.next))
            now = self.step(place.path)

    def next_iteration(self, place: Place, step: Step) -> None:
        """Begin the next iteration when the last one has settled, or settle the step. Raises EvaluationError, PayloadError."""
        assert step.repeat is not None
        assert place.plan.until is not None
        now = self.step(place.path)
        while now is not None and not now.settled and not self.state.over:
            item = place.item(now.next - 1)
            last = self.step(item.path)
            if last is None or not last.settled:
                return
            output = resolve(last.output, self.payloads) if last.output is not None else None
            if self.holds(item, place.plan.until, last=output) or (
                now.next >= step.repeat.at_most and step.repeat.otherwise == "last"
            ):
                self.complete(place, source=item.path)
                return
            if now.next >= step.repeat.at_most:
                message = f"`{step.repeat.until}` did not hold after {now.next} times"
                self.fail(place, Failure(FailureKind.LOOP_BOUND, message))
                return
            if self.full:
                self.add(TimerSet(place.path, self.at))
                return
            self.add(LoopAdvanced(place.path, now.next))
            self.enter(place.item(now.next))
            now = self.step(place.path)

    def complete_block(self, place: Place, frame: Frame) -> None:
        """Settle a step whose steps have settled."""
        step = place.plan.step
        assert isinstance(step, Step)
        if step.output is None:
            self.complete(place, source=f"{place.path}.{frame.order[-1]}")
            return
        value = frame.result.value
        assert value is not None
        inside = Place("", frame.result, place)
        self.guarded(place, lambda: self.complete(place, self.evaluate(inside, value)))

    # --- Cancelling ---

    def cancel(self, path: str, reason: str) -> None:
        """Cancel a step that is under way, with all its parts."""
        step = self.step(path)
        if step is None or step.settled:
            return
        for part in children(self.state.steps, path):
            self.cancel(part, reason)
        self.cancel_call(path, step, reason)
        self.add(StepCancelled(path, reason))

    def cancel_parts(self, place: Place, reason: str) -> None:
        """Cancel all parts of a step."""
        for part in children(self.state.steps, place.path):
            self.cancel(part, reason)

    def cancel_call(self, path: str, step: StepState, reason: str) -> None:
        """Cancel the call or child run that a step waits for, if it does."""
        if step.status is StepStatus.RUNNING:
            known = "" if path in self.requested else step.awaits
            if step.asked is None:
                self.add(CallCancelled(path, known, reason))
            else:
                self.add(ChildRunCancelled(path, run_id_of(known) if known else "", reason))

    # --- The end ---

    def complete_run(self) -> None:
        """End the run with its output, after the clean-up steps."""
        try:
            output = self.evaluate(Place("", self.plan.root.result), self.plan.output)
        except UNCOMPUTABLE as error:
            self.close(RunClosing("failed", failure=_uncomputable(error, "output: ")))
        else:
            self.close(RunClosing("completed", output))

    def close(self, closing: RunClosing, *, force: bool = False) -> None:
        """End the run: cancel what is under way, undo what was done, clean up."""
        why = "the run was cancelled" if closing.outcome == "cancelled" else "the run failed"
        undoing = sorted(filter(undone, self.before.steps)) if self.before.closing is not None else ()
        for path in (*self.plan.root.order, *undoing, FINALLY):
            self.cancel(path, why)
        undo = self.state.undo is not None and closing.outcome != "completed"
        if force or not (undo or self.plan.final):
            self.end(closing)
        else:
            self.add(closing)
            self.close_on()

    def close_on(self) -> None:
        """Undo what is to be undone next, then clean up, then end the run."""
        closing = self.state.closing
        assert closing is not None
        while self.state.undo is not None and closing.outcome != "completed":
            place = self.plan.place(undo_path(self.state.undo[0].step))
            assert place is not None
            self.attempt(place, 1)
            if not self.settled(place.path):
                return
        if self.plan.final is not None and not self.settled(FINALLY):
            if self.step(FINALLY) is None:
                place = Place(FINALLY, self.plan.final)
                self.enter(place, released=True)
            if not self.settled(FINALLY):
                return
        self.end(closing)

    def end(self, closing: RunClosing) -> None:
        """End the run."""
        last, undo = self.step(FINALLY), self.state.undo
        never: list[str] = []
        while undo is not None and closing.outcome != "completed":  # by force
            never.append(undo[0].step)
            undo = undo[1]
        not_undone = (*self.state.not_undone, *never)
        if closing.outcome == "cancelled":
            self.add(RunCancelled(closing.by, closing.reason, not_undone))
        elif closing.failure is not None:
            self.add(RunFailed(closing.step, closing.failure, not_undone))
        elif last is not None and last.failure is not None:
            self.add(RunFailed(FINALLY, last.failure))
        else:
            self.add(RunCompleted(closing.output or "null"))


def _uncomputable(error: Exception, where: str = "") -> Failure:
    """Return the failure of what could not be computed."""
    kind = FailureKind.EXPRESSION if isinstance(error, EvaluationError) else FailureKind.TOO_LARGE
    return Failure(kind, f"{where}{error}")


def _backoff(plan: StepPlan, before: StepState) -> int:
    """Return the wait before the next attempt in milliseconds: exponential, with jitter in [0.5, 1) from the failed call's id."""
    retry = plan.step.retry
    wait = min(retry.initial * retry.factor ** (before.attempt - 1), retry.maximum)
    jitter = int.from_bytes(hashlib.blake2b(before.awaits.encode(), digest_size=4).digest()) / 2**32
    return round(wait * (0.5 + jitter / 2))


__all__ = ["LONGEST_WAIT_MS", "Advance"]
