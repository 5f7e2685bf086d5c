"""Circuit breakers with a clock that only the test moves."""

import itertools
import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from events import codec
from events.failure import Failure, FailureKind
from events.workers import WorkerReported
from streams.processors.breaker import FRESH_S, LONGEST_S, SPREAD, Attempt, Breaker, Breakers, Policy, State, had_time
from streams.settings import Settings
from streams.testing import answers
from streams.testing import given as workflow

POLICY = Policy(calls=20, share=0.8, open_s=10.0)


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return them."""
        return self.now


class Circuit:
    """A breaker, its clock and the states that it went through."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.clock = Clock()
        self.states: list[State] = []
        self.breaker = Breaker("tool", policy, self.clock, lambda breaker: self.states.append(breaker.state))

    def call(self, error: str | None = None, takes: float = 0.0) -> bool:
        """Make a call that is answered or fails; say whether it was let in."""
        attempt = self.breaker.admit()
        if attempt is None:
            return False
        self.clock.now += takes
        with attempt:
            attempt.answered() if error is None else attempt.failed(error)
        return True

    def open(self) -> None:
        """Fail until it is open."""
        while self.breaker.state is State.CLOSED:
            assert self.call("down")

    def pass_time(self, seconds: float) -> None:
        """Let time go by."""
        self.clock.now += seconds


def test_a_share_of_the_last_calls_opens_it() -> None:
    """16 failures among the last 20 calls do, 15 don't, however many there were before."""
    circuit = Circuit()
    for _ in range(50):
        circuit.call()
    for _ in range(15):
        circuit.call("down")
    assert circuit.breaker.state is State.CLOSED
    circuit.call("down")
    assert circuit.breaker.state is State.OPEN
    assert (circuit.breaker.failed, circuit.breaker.calls, circuit.breaker.last_error) == (16, 20, "down")


def test_a_new_endpoint_that_is_down_is_known_after_as_many_failures() -> None:
    """It needs no calls that were answered."""
    circuit = Circuit()
    assert [circuit.call("down") for _ in range(17)] == [True] * 16 + [False]


def test_a_flaky_endpoint_is_not_down() -> None:
    """50,000 calls of which 30 % fail never open it."""
    circuit, chance = Circuit(), random.Random(14)  # noqa: S311 - the same calls each time
    for _ in range(50_000):
        circuit.call("flaky" if chance.random() < 0.3 else None)
    assert circuit.states == []


def test_old_failures_count_no_more() -> None:
    """What failed before `FRESH_S` says nothing of now."""
    circuit = Circuit()
    for _ in range(15):
        circuit.call("down")
    circuit.pass_time(FRESH_S + 1)
    for _ in range(15):
        circuit.call("down")
    assert circuit.states == []


def test_while_it_is_open_nothing_is_let_in_until_its_time_is_over() -> None:
    """Then one call is; others wait for what comes of it. It is answered: all are let in again."""
    circuit = Circuit()
    circuit.open()
    circuit.pass_time(9.99)
    assert circuit.breaker.admit() is None
    circuit.pass_time(0.01)
    probe = circuit.breaker.admit()
    assert probe is not None
    assert circuit.breaker.state is State.HALF_OPEN
    assert circuit.breaker.admit() is None
    probe.answered()
    assert circuit.breaker.state is State.CLOSED
    assert [circuit.call() for _ in range(10)] == [True] * 10
    assert circuit.states == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    assert (circuit.breaker.failed, circuit.breaker.opened, circuit.breaker.retry_at) == (0, None, None)


def test_each_probe_that_fails_doubles_the_wait() -> None:
    """Up to a minute; after it has closed, the first wait is the short one again."""
    circuit = Circuit()
    circuit.open()
    since = circuit.breaker.opened
    waits = []
    for _ in range(5):
        assert circuit.breaker.retry_at is not None
        waits.append(circuit.breaker.retry_at - circuit.clock.now)
        circuit.clock.now = circuit.breaker.retry_at
        assert circuit.call("still down")
    assert waits == [10, 20, 40, LONGEST_S, LONGEST_S]
    assert (circuit.breaker.opened, circuit.breaker.last_error) == (since, "still down")
    circuit.pass_time(LONGEST_S)
    assert circuit.call()
    circuit.open()
    assert circuit.breaker.retry_at == circuit.clock.now + 10


def test_a_probe_that_says_nothing_leaves_its_place_to_the_next() -> None:
    """A probe that is cancelled, or never comes as far as the endpoint, neither closes nor opens."""
    circuit = Circuit()
    circuit.open()
    circuit.pass_time(10)
    with circuit.breaker.admit() or pytest.fail("it was let in"):
        pass
    assert circuit.breaker.state is State.HALF_OPEN
    assert circuit.call()
    assert circuit.breaker.state is State.CLOSED


def test_calls_from_before_it_opened_change_nothing() -> None:
    """What was under way when it opened is heard no more: not as a failure, not as the answer of a probe."""
    circuit = Circuit()
    late = [circuit.breaker.admit() or pytest.fail("it was let in") for _ in range(3)]
    circuit.open()
    late[0].failed("late")
    circuit.pass_time(10)
    probe = circuit.breaker.admit()
    assert probe is not None
    late[1].answered()
    assert circuit.breaker.state is State.HALF_OPEN
    late[2].failed("late")
    assert circuit.breaker.admit() is None, "the probe is still under way"
    probe.answered()
    assert circuit.breaker.state is State.CLOSED
    assert circuit.breaker.last_error == "down"


def test_where_calls_take_long_the_others_wait_as_long_for_the_probe() -> None:
    """A refusal costs an attempt: to come back every ten seconds while a call takes minutes would use them up."""
    circuit = Circuit()
    circuit.call(takes=120)
    circuit.open()
    circuit.pass_time(10)
    assert circuit.breaker.admit() is not None
    assert 120 <= circuit.breaker.retry_after_s("a call") <= 120 + 10 * SPREAD
    circuit.pass_time(121)
    assert 10 <= circuit.breaker.retry_after_s("a call") <= 10 * (1 + SPREAD), "the probe is overdue"


def test_the_first_word_of_an_attempt_counts() -> None:
    """An answer that turns out to be useless later was an answer."""
    circuit = Circuit(Policy(1, 1.0, 10.0))
    attempt = circuit.breaker.admit()
    assert attempt is not None
    with attempt:
        attempt.answered()
        attempt.failed("afterwards")
    assert circuit.states == []


@given(
    st.integers(1, 8),
    st.floats(0.1, 1.0),
    st.lists(st.one_of(st.sampled_from(["admit", "answered", "failed", "nothing"]), st.floats(0.1, 40.0)), max_size=150),
    st.randoms(use_true_random=False),
)
def test_any_order_of_calls(calls: int, share: float, actions: list[str | float], chance: random.Random) -> None:
    """Against a model: it opens iff the window says so, lets at most one probe in, and closes iff the probe is answered."""
    policy = Policy(calls, share, 10.0)
    circuit = Circuit(policy)
    breaker, clock = circuit.breaker, circuit.clock
    flying: list[tuple[Attempt, int]] = []
    window: deque[tuple[float, bool]] = deque(maxlen=calls)
    state, epoch, retry_at, waits = State.CLOSED, 0, 0.0, 0
    for action in actions:
        if isinstance(action, float):
            clock.now += action
        elif action == "admit":
            attempt = breaker.admit()
            if state is State.OPEN and clock.now >= retry_at:
                state, epoch = State.HALF_OPEN, epoch + 1
            probing = sum(1 for _, at in flying if at == epoch)
            allowed = state is State.CLOSED or (state is State.HALF_OPEN and probing == 0)
            assert (attempt is not None) == allowed
            if attempt is not None:
                flying.append((attempt, epoch))
        elif flying:
            attempt, at = flying.pop(chance.randrange(len(flying)))
            with attempt:
                if action != "nothing":
                    attempt.answered() if action == "answered" else attempt.failed("down")
            if at == epoch and action != "nothing":
                failed = action == "failed"
                if state is State.HALF_OPEN:
                    state, epoch, waits = (State.OPEN, epoch + 1, waits + 1) if failed else (State.CLOSED, epoch + 1, 0)
                    window.clear()
                    retry_at = clock.now + min(10.0 * 2**waits, LONGEST_S)
                else:
                    window.append((clock.now, failed))
                    fresh = [bad for when, bad in window if when >= clock.now - FRESH_S]
                    if failed and sum(fresh) >= policy.failures:
                        state, epoch, retry_at = State.OPEN, epoch + 1, clock.now + 10.0
                        window.clear()
        assert breaker.state is state
    assert sum(1 for _, at in flying if at == epoch and state is State.HALF_OPEN) <= 1


# --- All circuits of a worker ---


def settings(**changes: float) -> Settings:
    return Settings.model_validate({"breaker_calls": 5, "breaker_open_s": 10.0} | changes)


def fail(breakers: Breakers, endpoint: str, times: int, error: str = "no connection") -> None:
    for _ in range(times):
        attempt = breakers.attempt(endpoint, "call")
        assert isinstance(attempt, Attempt)
        attempt.failed(error)


def test_a_refusal_is_a_failure_that_says_when_to_come_back() -> None:
    """It can be tried again, not before the circuit's time is over, and each call at its own time."""
    clock = Clock()
    breakers = Breakers(settings(), clock)
    fail(breakers, "prices", 4)
    refusals = [breakers.attempt("prices", f"call {number}") for number in range(50)]
    waits = []
    for refusal in refusals:
        assert isinstance(refusal, Failure)
        assert (refusal.kind, refusal.retryable) == (FailureKind.UNAVAILABLE, True)
        assert refusal.message.startswith("circuit of prices is open since 2")
        assert refusal.message.endswith(": no connection")
        waits.append(refusal.retry_after_ms or 0)
    assert 10_000 <= min(waits) < max(waits) <= 10_000 * (1 + SPREAD)
    assert len(set(waits)) > 40
    assert breakers.attempt("prices", "call 7") == refusals[7], "the same call is told the same"


def test_one_endpoint_is_not_another() -> None:
    """A circuit that is open keeps nobody from the others."""
    breakers = Breakers(settings(), Clock())
    fail(breakers, "down", 4)
    assert isinstance(breakers.attempt("down", "call"), Failure)
    assert isinstance(breakers.attempt("up", "call"), Attempt)


def test_zero_calls_switch_it_off() -> None:
    """Then nothing is ever refused."""
    breakers = Breakers(settings(breaker_calls=0), Clock())
    fail(breakers, "down", 1000)
    assert isinstance(breakers.attempt("down", "call"), Attempt)
    assert breakers.report() == ()


def test_each_change_is_logged_and_told() -> None:
    """`breaker.opened`, `breaker.half_open`, `breaker.closed`, with the endpoint and the reason."""
    clock, told = Clock(), itertools.count()
    breakers = Breakers(settings(), clock)
    breakers.on_change = lambda: (next(told), None)[1]
    with capture_logs() as lines:
        fail(breakers, "prices", 4)
        clock.now += 10
        probe = breakers.attempt("prices", "call")
        assert isinstance(probe, Attempt)
        probe.answered()
    assert [line["event"] for line in lines] == ["breaker.opened", "breaker.half_open", "breaker.closed"]
    assert [line["log_level"] for line in lines] == ["warning", "warning", "info"]
    assert (
        lines[0] | {"endpoint": "prices", "failed": 4, "of": 4, "last_error": "no connection", "retry_after_s": 10.0} == lines[0]
    )
    assert next(told) == 3


def test_what_is_reported() -> None:
    """Circuits that aren't closed, or have seen failures; times by the wall clock."""
    clock = Clock()
    breakers = Breakers(settings(), clock)
    attempt = breakers.attempt("fine", "call")
    assert isinstance(attempt, Attempt)
    attempt.answered()
    fail(breakers, "flaky", 1, "once")
    fail(breakers, "down", 4)
    clock.now += 3
    flaky, down = breakers.report()
    assert (flaky.endpoint, flaky.state, flaky.failures, flaky.calls, flaky.last_error) == ("flaky", "closed", 1, 1, "once")
    assert flaky.retry_at is None
    assert (down.endpoint, down.state, down.failures, down.calls) == ("down", "open", 4, 4)
    assert down.retry_at is not None
    assert abs(down.retry_at - down.since - 10_000) <= 2
    report = WorkerReported("tool-1", "tool", "here", 1, "0.1.0", 1, 2, 3, 128, (0, 7), (flaky, down))
    assert codec.decode(codec.encode(report), WorkerReported) == report


def test_half_of_its_time_is_enough() -> None:
    """A call that waited for us longer than for its answer says nothing of the endpoint."""
    assert had_time(15.0, 0, 30_000)
    assert not had_time(15.001, 0, 30_000)
    assert not had_time(31.0, 0, 30_000)


def test_attempts_are_not_used_up_while_a_circuit_is_open() -> None:
    """A step comes back when the refusal says, not when its own back-off is over."""
    clock = Clock()
    breakers = Breakers(settings(), clock)
    fail(breakers, "prices", 4)
    refusal = breakers.attempt("prices", "call")
    assert isinstance(refusal, Failure)
    spec = {"name": "patient", "steps": {"ask": {"tool": {"name": "prices"}, "retry": {"attempts": 4, "initial": "1ms"}}}}
    run = workflow(spec, tools={"prices": answers(refusal, refusal, 42)})
    run.then_called("prices", times=1)
    for calls in (1, 2):
        run.when_time_passes(f"{(refusal.retry_after_ms or 0) - 1}ms").then_called("prices", times=calls)
        run.when_time_passes("1ms").then_called("prices", times=calls + 1)
    run.then_completed()
