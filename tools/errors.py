"""What a tool may raise: the two errors that a caller treats differently."""


class ToolError(Exception):
    """A call failed and said so itself; use one of the two kinds below."""


class TerminalError(ToolError):
    """Trying again would fail again: the arguments or the data are wrong."""


class RetryableError(ToolError):
    """Trying again may help.

    `retry_after_s`: seconds to wait before that, when the other side said so.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
