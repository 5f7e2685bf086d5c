"""`foldflow workflows NAME` and `foldflow diff` of registered versions, against a real Kafka."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from events import topics
from events.commands import WorkflowRegistered
from streams import kafka as clients
from streams.envelope import envelope
from streams.registry import SpecRegistry
from streams.settings import Settings
from streams.workflow.definition import parse

Cli = Callable[..., subprocess.CompletedProcess[str]]
TEXT = "name: versions\nsteps:\n  a: {transform: %s}\n"


@pytest.fixture(scope="module")
def settings(kafka: str) -> Settings:
    """Return settings of a namespace of this module."""
    made = Settings(bootstrap_servers=kafka, topic_prefix="versions.", partitions=1)
    clients.connect(made)
    return made


@pytest.fixture(scope="module")
def cli(settings: Settings) -> Cli:
    """Return a function that runs `foldflow`."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")},
        "FOLDFLOW_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "FOLDFLOW_TOPIC_PREFIX": settings.topic_prefix,
        "FOLDFLOW_PARTITIONS": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=90, check=False)

    return run


def test_versions_are_listed_and_compared(cli: Cli, settings: Settings, tmp_path: Path) -> None:
    """Newest first, with their times; NAME is the newest, NAME@BEGINNING any; one for those who name it is never the newest."""
    digests = []
    for number in (1, 2):
        file = tmp_path / f"v{number}.yaml"
        file.write_text(TEXT % number)
        deployed = cli("deploy", str(file), "--json")
        assert deployed.returncode == 0, deployed.stderr
        digests.append(json.loads(deployed.stdout)[0]["digest"])
    fork = parse((TEXT % 3).encode(), "f")
    event = WorkflowRegistered(fork.name, fork.digest, fork.canonical, current=False)
    clients.send(settings, [envelope(topics.SPECS, fork.digest, event, source="test", identity=fork.digest)])

    listed = json.loads(cli("workflows", "versions", "--json").stdout)
    assert [(each["digest"], each["newest"], each["current"]) for each in listed] == [
        (fork.digest, False, False),
        (digests[1], True, True),
        (digests[0], False, True),
    ]
    assert listed[0]["registered"] >= listed[2]["registered"] > 1_700_000_000_000
    shown = cli("workflows", "versions").stdout
    assert [digest[:12] in shown for digest in digests] == [True, True]
    assert ("newest" in shown, "only by its digest" in shown) == (True, True)

    differs = cli("diff", f"versions@{digests[0][:8]}", "versions")
    assert (differs.returncode, "~ steps.a changed" in differs.stdout) == (1, True), differs.stderr
    assert "    -transform: 1\n    +transform: 2\n" in differs.stdout
    assert cli("diff", "versions", str(tmp_path / "v2.yaml")).returncode == 0
    assert cli("diff", f"versions@{fork.digest}", "versions").returncode == 1

    unknown = cli("diff", "versoins", "versions")
    assert (unknown.returncode, "did you mean `versions`?" in unknown.stderr) == (2, True)
    nothing = cli("diff", "versions@zzz", "versions")
    assert (nothing.returncode, digests[0][:12] in nothing.stderr) == (2, True)
    assert cli("workflows", "nope").returncode == 2


def test_a_version_registered_again_is_the_newest_again(cli: Cli, settings: Settings, tmp_path: Path) -> None:
    """And is listed once."""
    name = "again"
    for number in (1, 2, 1):
        (tmp_path / "w.yaml").write_text((TEXT % number).replace("versions", name))
        assert cli("deploy", str(tmp_path / "w.yaml")).returncode == 0
    registry = SpecRegistry(settings)
    registry.refresh()
    versions = registry.versions(name)
    newest = registry.newest(name)
    registry.close()
    assert newest is not None
    assert [each.digest for each in versions][-1] == newest.digest
    assert newest.steps[0].transform == 1
    assert len(versions) == 2
