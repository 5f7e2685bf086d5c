"""Checks a model's reading of a question against the question itself."""

import re
from dataclasses import dataclass
from typing import Any

from tools.builtin import known_shares
from tools.builtin.parse_question import Plan, find_shares, parse_question
from tools.builtin.periods import month_of


@dataclass(frozen=True, slots=True)
class PlanCheck:
    """Whether a reading holds: `plan` is there exactly if `ok`; otherwise `problems` says why not, in English."""

    ok: bool
    problems: list[str]
    plan: Plan | None


def check_plan(question: str, plan: Any) -> PlanCheck:
    """Check that `plan`, a model's answer `{tickers, start, end}`, is what the question asks.

    It holds if its shares are exactly those that the question names (all, if it names none) and its period is the
    one that the question states (the whole range, if it states none), within the data. `start` and `end` are years
    or months, "2004" or "2004-08". Any JSON is taken: a model may answer anything, and that is a problem to report.
    """
    if not isinstance(plan, dict):
        return PlanCheck(ok=False, problems=["The answer is no JSON object."], plan=None)
    expected = parse_question(question)
    problems = [*_share_problems(question, plan.get("tickers")), *_period_problems(plan, expected)]
    return PlanCheck(ok=not problems, problems=problems, plan=None if problems else expected)


def _share_problems(question: str, tickers: Any) -> list[str]:
    if not isinstance(tickers, list) or not all(isinstance(ticker, str) for ticker in tickers):
        return ["The answer has no list of shares."]
    answered = {ticker.upper() for ticker in tickers}
    problems = [f"{ticker} is no share in the data." for ticker in sorted(answered - known_shares.NAMES.keys())]
    answered &= known_shares.NAMES.keys()
    named = find_shares(question).keys()
    if not named and answered != known_shares.NAMES.keys():
        problems.append(f"The question names no share, but the answer picks {_list(answered) or 'none'}.")
    elif named:
        problems += [f"The answer adds {_list(answered - named)}, not named in the question."] if answered - named else []
        problems += [f"The answer leaves out {_list(named - answered)}, named in the question."] if named - answered else []
    return problems


def _period_problems(plan: dict[str, Any], expected: Plan) -> list[str]:
    months: dict[str, int] = {}
    for key, suffix in (("start", "-01"), ("end", "-12")):
        value = str(plan.get(key))
        try:
            months[key] = month_of(value + suffix if re.fullmatch(r"\d{4}", value) else value)
        except ValueError:
            return [f"The answer's {key} is neither a year nor a month."]
    first, last = month_of(known_shares.FIRST), month_of(known_shares.LAST)
    if months["start"] > months["end"]:
        return [f"The answer's period ends ({plan['end']}) before it starts ({plan['start']})."]
    # By year, because the data begins and ends within one: "2010" is a fair answer for "until March 2010".
    if months["start"] // 12 < first // 12 or months["end"] // 12 > last // 12:
        return [f"The answer's period {plan['start']} to {plan['end']} lies outside the data."]
    assert expected.start is not None  # both are known for the built-in data
    assert expected.end is not None
    if (max(months["start"], first), min(months["end"], last)) == (month_of(expected.start), month_of(expected.end)):
        return []
    asked = f'"{expected.matched.period}" is' if expected.matched.period else "no period is named, which means"
    return [f"The answer's period is {plan['start']} to {plan['end']}; {asked} {expected.start} to {expected.end}."]


def _list(tickers: set[str]) -> str:
    return ", ".join(sorted(tickers))
