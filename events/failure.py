"""Failures: a closed set of kinds, and what follows from each."""

from enum import StrEnum
from typing import Final

from events.frozen import frozen


class FailureKind(StrEnum):
    """What went wrong, by what can be done about it."""

    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    INVALID_OUTPUT = "invalid_output"
    TOOL_RETRYABLE = "tool_retryable"
    TOOL_TERMINAL = "tool_terminal"
    TOOL_CRASHED = "tool_crashed"
    INVALID_ARGUMENTS = "invalid_arguments"
    UNKNOWN_TOOL = "unknown_tool"
    UNKNOWN_WORKFLOW = "unknown_workflow"
    UNAUTHORIZED = "unauthorized"
    REJECTED = "rejected"
    CONTEXT_TOO_LONG = "context_too_long"
    EXPRESSION = "expression"
    TOO_LARGE = "too_large"
    CANCELLED = "cancelled"
    NOT_APPROVED = "not_approved"
    CHILD_FAILED = "child_failed"
    LOOP_BOUND = "loop_bound"
    INTERNAL = "internal"


RETRYABLE: Final = frozenset(
    {
        FailureKind.TIMEOUT,
        FailureKind.RATE_LIMITED,
        FailureKind.UNAVAILABLE,
        FailureKind.INVALID_OUTPUT,
        FailureKind.TOOL_RETRYABLE,
        FailureKind.TOOL_CRASHED,
    }
)
"""Kinds for which another attempt can help."""


@frozen
class Failure:
    """Why something failed. `kind` is a `FailureKind`, or a word of a later version's set; times in milliseconds."""

    kind: str
    message: str
    retry_after_ms: int | None = None

    @property
    def retryable(self) -> bool:
        """Whether another attempt can help; a kind that is not known here can't be retried."""
        return self.kind in RETRYABLE
