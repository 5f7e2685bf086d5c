"""Schemathesis: whatever is asked of the API and of the gateway, they answer as their OpenAPI documents say."""

import subprocess
import sys
from pathlib import Path

import pytest
from served_api import histories, served, write
from test_gateway import SPEC, gateway

from api.tokens import AUDITOR, REQUESTER, Tokens, create
from events import ids
from streams import kafka
from streams.registry import publish
from streams.settings import Settings

_FEW, _MANY = 3, 300
"""Examples for each operation; when there are many, also those at the edges of what is allowed."""


def examined(base: str, folder: Path, token: str, examples: int, parameters: str = "") -> None:
    """Let Schemathesis ask anything that the document allows, and what it doesn't; all of its checks must pass.

    One of them is replaced by a stricter one: see `any_request`.
    """
    configuration = folder / "schemathesis.toml"
    configuration.write_text(f"[parameters]\n{parameters}\n[checks]\npositive_data_acceptance.enabled = false\n")
    command = [
        *(
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(configuration),
            "run",
            f"{base}/openapi.json",
        ),
        *("--header", f"Authorization:Bearer {token}", "--max-examples", str(examples), "--seed", "1", "--no-shrink"),
        *(
            "--phases",
            "examples,fuzzing" if examples == _FEW else "examples,coverage,fuzzing",
            "--suppress-health-check",
            "all",
            "--warnings",
            "off",
            "--no-color",
        ),
        # An endless answer; test_stream asks for it.
        *("--exclude-path", "/stream"),
    ]
    environment = {"PATH": "", "NO_PROXY": "*", "PYTHONPATH": str(Path(__file__).parent), "SCHEMATHESIS_HOOKS": "any_request"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr


def api(settings: Settings, folder: Path, examples: int) -> None:
    """Examine the API: any parameters, and those of a run that there is."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS, "api_rate": 0})
    found = f'"path.run_id" = "{ids.run_id("request 3")}"\n'
    kafka.connect(made)
    publish(made, [histories.SPEC, histories.RICH])
    write(made, histories.logs(91, 12, 0.2, histories.BOTH))
    token = create(folder / "tokens", AUDITOR, "ann")
    with served(made, tokens=Tokens(folder / "tokens")) as client:
        for parameters in ("", found) if examples > _FEW else (found,):
            examined(str(client.base_url), folder, token, examples, parameters)


def requests(settings: Settings, folder: Path, examples: int) -> None:
    """Examine the gateway."""
    publish(settings, [SPEC])
    made = settings.model_copy(update={"gateway_port": settings.api_port, "api_rate": 0})
    token = create(folder / "tokens", REQUESTER, "shop")
    with gateway(made, Tokens(folder / "tokens")) as client:
        examined(str(client.base_url), folder, token, examples)


def test_the_api_answers_as_its_document_says(settings: Settings, tmp_path: Path) -> None:
    """Given a history, some hundred requests of every kind find no answer that the document doesn't know."""
    api(settings, tmp_path, _FEW)


def test_the_gateway_answers_as_its_document_says(few: Settings, tmp_path: Path) -> None:
    """Given a workflow, the same for the gateway."""
    requests(few, tmp_path, _FEW)


@pytest.mark.thorough
def test_the_api_does_for_many_requests(settings: Settings, tmp_path: Path) -> None:
    """The same with many."""
    api(settings, tmp_path, _MANY)


@pytest.mark.thorough
def test_the_gateway_does_for_many_requests(few: Settings, tmp_path: Path) -> None:
    """The same with many."""
    requests(few, tmp_path, _MANY)
