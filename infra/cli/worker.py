"""`foldflow worker ROLE`: one process of the processors."""

from typing import Annotated

import typer

from streams.settings import Settings


def worker(role: Annotated[str, typer.Argument(help="intake, orchestrator, llm, tool or mirror.")]) -> None:
    """Run one role's processors in the foreground.

    Example: foldflow worker orchestrator
    """
    from streams import app  # noqa: PLC0415 - Faust takes most of a second
    from streams.topology import ROLES  # noqa: PLC0415

    if role not in ROLES:
        raise typer.BadParameter(f"there is no role {role}; there are: {', '.join(ROLES)}")
    app.run(role, Settings())
