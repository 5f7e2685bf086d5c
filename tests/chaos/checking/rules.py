"""The rules about the history itself. Each yields what breaks it: where, and what is wrong there.

They know of the record's format what the design says of the ledger protocol, and nothing of what a workflow may do next.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from checking.ledger import RESULTS, Decision, Ledger, effect_id, run_id_of

Finding = tuple[str, str]
_ANSWERED: Final = ("ToolCall", "LlmCall")


def one_run_per_request(ledger: Ledger) -> Iterator[Finding]:
    """Find requests without their one run, and runs without a request."""
    runs: dict[str, list[Decision]] = defaultdict(list)
    for (_, run), chain in ledger.chains.items():
        runs[run].append(chain[0])
        yield from _beginning(chain)
    for run, firsts in runs.items():
        if len(firsts) > 1:
            yield f"run {run}", f"it was started {len(firsts)} times: {'; '.join(first.where for first in firsts)}"
    yield from _requests_lost(ledger)
    for request_id, where in _taken(ledger).items():
        if run_id_of(request_id) not in runs:
            yield where, f"request {request_id} has no run ({run_id_of(request_id)})"
    for (partition, offset), given in ledger.inbox.items():
        if given.run not in runs and _could_start(ledger, partition, offset):
            yield f"inbox/{partition}/{offset}", f"run {given.run} was to be started and was not"
    known = {request.request_id for request in ledger.requests} | {wanted.request_id for wanted in ledger.wanted or ()}
    for first in (each for firsts in runs.values() for each in firsts):
        if first.kind == "StartRun" and first.named not in known:
            yield first.where, f"nobody asked for it: there is no request {first.named}"


def _requests_lost(ledger: Ledger) -> Iterator[Finding]:
    """Find requests that were acknowledged and are gone, and what was passed over without a word."""
    there = {(*request.place, request.request_id) for request in ledger.requests}
    for wanted in ledger.wanted or ():
        if wanted.topic.endswith("requests") and ("requests", wanted.partition, wanted.offset, wanted.request_id) not in there:
            yield f"requests/{wanted.partition}/{wanted.offset}", f"request {wanted.request_id} was acknowledged and isn't there"
    for request in ledger.requests:
        if not request.kind and request.place not in ledger.letters:
            yield _place(request.place), "it can't be read, and there is no dead letter that says so"


def _taken(ledger: Ledger) -> dict[str, str]:
    """Return the requests that must have a run, with where they are: not refused, or expected to end in some way."""
    requests = (each for each in ledger.requests if each.kind == "run" and each.place not in ledger.letters)
    expected = (each.request_id for each in ledger.wanted or () if each.expect != "any")
    return {each: f"requests.jsonl, {each}" for each in expected} | {each.request_id: _place(each.place) for each in requests}


def _beginning(chain: list[Decision]) -> Iterator[Finding]:
    first = chain[0]
    if first.kind != "StartRun":
        yield first.where, f"the run begins with {first.kind}"
    elif first.run_id != run_id_of(first.named or ""):
        yield first.where, f"it is not the run of request {first.named}"
    for each in chain[1:]:
        if each.kind == "StartRun" and not each.ignored:
            yield each.where, "the run is started once more"


def every_run_ends(ledger: Ledger) -> Iterator[Finding]:
    """Find runs that don't end once, in their last decision, as they must, or are not in the index of finished runs."""
    expected = {run_id_of(wanted.request_id): wanted.expect for wanted in ledger.wanted or ()}
    topic_id = ledger.topic_ids.get("decisions")
    indexed: set[tuple[int, str]] = set()
    for entry in ledger.finished:
        chain = ledger.chains.get((entry.place[1], entry.run_id))
        if topic_id is not None and entry.decisions_topic_id != topic_id:
            continue  # of a former topic: it says nothing
        indexed.add((entry.place[1], entry.run_id))
        if chain is None:
            yield _place(entry.place), f"the index has run {entry.run_id}, of which there is no decision"
        elif entry.first_offset != chain[0].offset:
            yield _place(entry.place), f"the index says offset {entry.first_offset} of {chain[0].where}"
    for place, chain in ledger.chains.items():
        last = chain[-1]
        ends = [end for each in chain for end in each.ends]
        if not ends:
            yield last.where, "the run has no end"
            if place in indexed:
                yield last.where, "the index says that the run is over"
        elif len(ends) > 1 or not last.ends:
            yield last.where, f"the run ends {len(ends)} times ({', '.join(ends)}), and has {len(chain)} decisions"
        elif expected.get(last.run_id, "any") not in ("any", ends[0]):
            yield last.where, f"the run is {ends[0]}, and should be {expected[last.run_id]}"
        if ends and place not in indexed:
            yield last.where, "the run is over and is not in the index"


def seq_without_gaps(ledger: Ledger) -> Iterator[Finding]:
    """Find decisions that count and are not numbered 1, 2, 3 … in their run."""
    for chain in ledger.chains.values():
        for number, each in enumerate(chain, 1):
            if each.seq != number:
                yield each.where, f"it is decision number {number} of its run"


def one_decision_per_input(ledger: Ledger) -> Iterator[Finding]:
    """Find inputs that were decided twice, passed over while their run was open, or decided out of their order."""
    seen: dict[tuple[int, bytes, int], Decision] = {}
    for (partition, run), chain in ledger.chains.items():
        last: dict[bytes, int] = {}
        for each in chain:
            other = seen.setdefault((partition, each.topic_id, each.input_offset), each)
            if other is not each:
                yield each.where, f"its input {each.input_offset} is also that of {other.where}"
            elif each.input_offset < last.get(each.topic_id, -1):
                yield each.where, f"its input {each.input_offset} comes before {last[each.topic_id]}, which was decided already"
            last[each.topic_id] = max(each.input_offset, last.get(each.topic_id, -1))
        decided = {each.input_offset for each in chain if ledger.here(each)}
        if not decided:
            continue
        first, end = min(decided), max(decided)
        for offset in ledger.inputs.get((partition, run), ()):
            if first < offset < end and offset not in decided:
                yield f"inbox/{partition}/{offset}", f"run {run} was open and has no decision on it"
            elif offset < first and _could_start(ledger, partition, offset):
                yield f"inbox/{partition}/{offset}", f"run {run} was not started by it, but by {first}"


def chains_whole(ledger: Ledger) -> Iterator[Finding]:
    """Find decisions that count and don't extend the one before, stand elsewhere, or don't say what is on the inbox."""
    for chain in ledger.chains.values():
        before = bytes(32)
        for each in chain:
            if each.prev != before:
                yield each.where, "it doesn't name the hash of the decision before it"
            before = each.hash
            for problem in _told_wrong(ledger, each):
                yield each.where, problem
    seen: set[int] = set()
    today = ledger.topic_ids.get("inbox")
    for each in ledger.decisions:
        if each.verdict == "accepted" and each.topic_id == today:
            seen.add(each.partition)
        elif each.verdict == "accepted" and each.partition in seen:
            yield each.where, f"its input is of inbox {each.topic_id.hex()}, though today's was there before"


def _told_wrong(ledger: Ledger, each: Decision) -> Iterator[str]:
    """Yield what a decision's record says otherwise than its surroundings do."""
    yield from each.odd
    if not ledger.here(each):
        return
    given = ledger.inbox_of(each)
    if given is None:
        yield f"its input is not on the inbox: {each.partition}/{each.input_offset}"
        return
    if given.run != each.run_id:
        yield f"its input {each.input_offset} is for run {given.run}"
    if each.at != given.timestamp:
        yield f"it says that its input came at {each.at}, the inbox says {given.timestamp}"
    there = ("UnreadableInput", given.raw.hex().encode()) if each.kind == "UnreadableInput" else (given.kind, given.digest)
    if (each.kind, each.input) != there:
        yield f"its input is not what stands on the inbox at {each.input_offset} ({each.kind}; {given.kind or 'unreadable'})"


def ignored_explained(ledger: Ledger) -> Iterator[Finding]:
    """Find what doesn't count, and is neither a duplicate nor what an honest owner writes who was overtaken.

    Such an owner decides the next input of the run after the decision that it extends: whether there is a decision on an input
    is the same for all versions of the code.
    """
    for place, problem in ledger.unreadable:
        if place not in ledger.letters:
            yield _place(place), problem
    for each in ledger.decisions:
        if each.verdict == "accepted":
            continue
        if each.verdict == "unexplained":
            yield each.where, "it extends nothing that was in the log before it: a record was changed, moved, or is missing"
        elif each.verdict == "loser":
            problems = list(_told_wrong(ledger, each))
            if not problems and (expected := _next_input(ledger, each)) not in (None, each.input_offset):
                problems.append(f"it decides input {each.input_offset}; the next one of its run was {expected}")
            for problem in problems:
                yield each.where, f"it was overtaken, and {problem}"
        elif each.odd:
            yield each.where, f"it is a duplicate, and {'; '.join(each.odd)}"


def _next_input(ledger: Ledger, each: Decision) -> int | None:
    """Return which input must follow the one that a decision extends; None: it can't be said any more."""
    offsets = ledger.inputs.get((each.partition, each.run_id), [])
    if each.before is None:
        starts = [at for at in offsets if _could_start(ledger, each.partition, at)]
        return starts[0] if starts and ledger.here(each) else None
    if not ledger.here(each.before):
        return None
    after = bisect_right(offsets, each.before.input_offset)
    return offsets[after] if after < len(offsets) else -1


def _could_start(ledger: Ledger, partition: int, offset: int) -> bool:
    return ledger.inbox[partition, offset].kind == "StartRun" and ("inbox", partition, offset) not in ledger.letters


def results_belong_to_calls(ledger: Ledger) -> Iterator[Finding]:
    """Find results and timers that changed a run which hadn't asked for them, and queued calls that nobody decided."""
    for chain in ledger.chains.values():
        asked: dict[str, tuple[str, str]] = {}
        answered: set[str] = set()
        for number, each in enumerate(chain):
            if not each.ignored and each.named is not None:
                yield from _answered(each, chain[:number] if each.kind == "TimerFired" else (), asked, answered)
            asked.update((call.call_id, (call.kind, call.step)) for call in each.calls)
    for sent in ledger.sent:
        call, decision = ledger.requested.get(sent.call_id, (None, None))
        if call is None or decision is None:
            yield _place(sent.place), f"call {sent.call_id} of run {sent.run_id} was not decided"
        elif (decision.run_id, call.request) != (sent.run_id, sent.request):
            yield _place(sent.place), f"call {sent.call_id} is not what {decision.where} requests"


def _answered(
    each: Decision, before: Sequence[Decision], asked: dict[str, tuple[str, str]], answered: set[str]
) -> Iterator[Finding]:
    """Judge a result or a timer that changed its run; `before`: the decisions that may have set the timer."""
    named = each.named or ""
    if each.kind == "TimerFired":
        if named not in asked and named not in _effects(before):
            yield each.where, f"timer {named} was never set"
    elif each.kind in RESULTS:
        if asked.get(named) != (RESULTS[each.kind], each.step):
            yield each.where, f"{each.kind} of call {named}, step {each.step}: the run has {asked.get(named, 'no such call')}"
        elif named in answered:
            yield each.where, f"call {named} is answered for the second time"
        answered.add(named)


def _effects(chain: Sequence[Decision]) -> Iterator[str]:
    """Yield the ids of effects, the latest first: a timer is seldom older than a few decisions."""
    for each in reversed(chain):
        for index in range(each.effects):
            yield effect_id(each.hash, index)


def _place(place: tuple[str, int, int]) -> str:
    return "/".join(map(str, place))


def history_figures(ledger: Ledger) -> dict[str, int]:
    """Return what was counted.

    `losers_differing`: overtaken decisions on an input that an accepted one decided otherwise, as only other code does;
    `inputs_gone`: decisions that count, on inputs of a former inbox or that retention has deleted: nothing to compare them with.
    """
    verdicts = Counter(each.verdict for each in ledger.decisions)
    accepted = {(each.partition, each.prev, each.input_offset) for chain in ledger.chains.values() for each in chain}
    ends = Counter(chain[-1].ends[-1] for chain in ledger.chains.values() if chain[-1].ends)
    losers = [each for each in ledger.decisions if each.verdict == "loser"]
    calls = [call for call, decision in ledger.requested.values() if call.kind in _ANSWERED and decision.verdict == "accepted"]
    queued = {sent.call_id for sent in ledger.sent}
    of_losers = [call for call in queued & ledger.requested.keys() if ledger.requested[call][1].verdict != "accepted"]
    return {
        "requests": len(ledger.wanted if ledger.wanted is not None else ledger.requests),
        "runs": len(ledger.chains),
        **{f"runs_{end}": ends[end] for end in ("completed", "failed", "cancelled")},
        "inputs": len(ledger.inbox),
        "decisions": len(ledger.decisions),
        **{name: verdicts[name] for name in ("accepted", "duplicate", "loser", "unexplained")},
        "losers_differing": sum((each.partition, each.prev, each.input_offset) in accepted for each in losers),
        "inputs_gone": sum(not ledger.here(each) for chain in ledger.chains.values() for each in chain),
        "inputs_ignored": sum(each.ignored for chain in ledger.chains.values() for each in chain),
        "dead_letters": len(ledger.letters),
        "unreadable": len(ledger.unreadable),
        "calls_requested": len(calls),
        "calls_queued": len(queued),
        "calls_queued_again": len(ledger.sent) - len(queued),
        "calls_queued_of_losers": len(of_losers),
    }
