"""What the commands share: saying things, ending with a code, and how figures are written."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NoReturn

import typer

from streams.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

_WIDE: Final = 400


def say(text: str) -> None:
    """Write a line for a person, beside the output."""
    print(text, file=sys.stderr)


def fail(text: str, code: int) -> NoReturn:
    """Say what is wrong and what to do, and end with an exit code."""
    say(text)
    raise typer.Exit(code)


def quiet(settings: Settings) -> Settings:
    """Return the settings without librdkafka's own lines on the terminal: what matters is said by the command."""
    return settings.model_copy(update={"kafka": {"log_level": "0", **settings.kafka}})


def console(*, stderr: bool = False) -> "Console":
    """Return where tables go; what isn't a terminal has room for everything, so that pipes see whole ids."""
    from rich.console import Console  # noqa: PLC0415 - 0.1 s

    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE, soft_wrap=True)


def pairs(texts: list[str], option: str = "--label") -> dict[str, str]:
    """Return `key=value` options as a dictionary. Raises typer.BadParameter."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"`{text}` is no KEY=VALUE", param_hint=option)
        found[key] = value
    return found


def took(ms: float | None) -> str:
    """Write a duration in milliseconds as people say it."""
    if ms is None:
        return ""
    if ms < 1000:  # noqa: PLR2004 - a second
        return f"{ms:.0f} ms"
    if ms < 60_000:  # noqa: PLR2004 - a minute
        return f"{ms / 1000:.1f} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def money(usd: float | None) -> str:
    """Write an amount in US dollars, small ones with more digits."""
    if usd is None:
        return ""
    return f"${usd:.2f}" if usd == 0 or usd >= 1 else f"${usd:.6f}".rstrip("0")


def clock(ms: int) -> str:
    """Write a time (milliseconds since the epoch) in this machine's time zone, with question marks if no calendar has it."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):  # records of outsiders bear any
        return "????-??-?? ??:??:??.???"
