"""`foldflow token`: makes, lists and revokes the tokens that the read API and the gateway ask for."""

import json
from pathlib import Path
from typing import Annotated

import typer

from api import tokens
from infra.cli.terminal import console, fail, say
from streams.settings import Settings

_WRONG = 2

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

token = typer.Typer(
    help="Make, list and revoke the tokens that the read API and the gateway ask for.\n\n"
    "They are in the file that FOLDFLOW_API_TOKENS names, which holds their SHA-256 only. Servers see changes at once.",
    no_args_is_help=True,
)


@token.command()
def create(
    role: Annotated[
        str,
        typer.Option(help="; ".join(f"{name}: {text.split(';', 1)[0]}" for name, text in tokens.ROLES.items()) + "."),
    ],
    name: Annotated[str, typer.Option(help="Whose it is, to revoke it by; on signals that it sends it stands as the sender.")],
    as_json: Json = False,
) -> None:
    """Make a token and print it: it is shown this once.

    For example:

        export FOLDFLOW_API_TOKENS=.foldflow/tokens

        foldflow token create --role reader --name grafana

        curl -H "Authorization: Bearer $(foldflow token create --role auditor --name ann)" http://127.0.0.1:29094/runs

    Exit codes: 0 made, 2 a wrong option, no file is configured, or there is a token of that name.
    """
    if role not in tokens.ROLES:
        raise typer.BadParameter(f"`{role}` is none of {', '.join(tokens.ROLES)}", param_hint="--role")
    path = _file()
    try:
        shown = tokens.create(path, role, name)
    except tokens.TokensError as error:
        fail(str(error), _WRONG)
    print(json.dumps({"name": name, "role": role, "token": shown}) if as_json else shown)
    if not as_json:
        say(f"`{name}` {tokens.ROLES[role]}. Keep it: it can't be shown again. Revoke it: foldflow token revoke {name}")


@token.command("list")
def list_(as_json: Json = False) -> None:
    """List the tokens: names, roles, when they were made.

    For example:

        foldflow token list --json

    Exit codes: 0 listed, 2 no file is configured, or it can't be read.
    """
    path = _file()
    try:
        held = tokens.read(path)
    except tokens.TokensError as error:
        fail(str(error), _WRONG)
    if as_json:
        print(json.dumps([{"name": each.name, "role": each.role, "made": each.made} for each in held]))
        return
    from rich.table import Table  # noqa: PLC0415 - 0.1 s

    table = Table("name", "role", "made", box=None)
    for each in held:
        table.add_row(each.name, each.role, each.made)
    console().print(table)
    if not held:
        say(f"{path} holds no token: nobody may ask. Make one: foldflow token create --role reader --name NAME")


@token.command()
def revoke(name: Annotated[str, typer.Argument(help="The token's name (`foldflow token list`).")]) -> None:
    """Revoke a token: from now on whoever shows it is turned away.

    For example:

        foldflow token revoke grafana

    Exit codes: 0 revoked, 2 there is none of that name, or no file is configured.
    """
    try:
        tokens.revoke(_file(), name)
    except tokens.TokensError as error:
        fail(str(error), _WRONG)
    say(f"`{name}` is revoked.")


def _file() -> Path:
    path = Settings().api_tokens
    if path is None:
        fail("No file of tokens is configured: set FOLDFLOW_API_TOKENS, for example to .foldflow/tokens", _WRONG)
    return path
