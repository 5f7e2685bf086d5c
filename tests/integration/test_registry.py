"""The registry's read endpoints, asked by clients that nobody here wrote; and a real registry, where one can be had."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.schema_registry.error import SchemaRegistryError
from confluent_kafka.serialization import MessageField, SerializationContext
from ports import free_port
from served_api import histories, served, until, write

from events import catalog, topics
from events.commands import RunRequest
from events.decisions import Decision, SchemaPublished
from infra.embedded.supervisor import Supervisor
from streams import kafka, schemas
from streams.envelope import envelope
from streams.settings import Settings

HERE = Path(__file__).parent
TYPE = "application/vnd.schemaregistry.v1+json"
DECISION = catalog.ENTRIES[Decision]


@pytest.fixture
def own(settings: Settings) -> Settings:
    """Return this test's settings, with topics made and schemas published."""
    made = settings.model_copy(update={"partitions": histories.PARTITIONS})
    kafka.connect(made)
    schemas.publish(made)
    return made


def client_of(settings: Settings) -> SchemaRegistryClient:
    return SchemaRegistryClient({"url": f"http://127.0.0.1:{settings.api_port}/registry"})


def test_confluent_s_client_finds_all_schemas_and_decodes_decisions(own: Settings) -> None:
    """Given decisions in Kafka, then Confluent's client lists, looks up and decodes, and its producer's question is answered."""
    log = histories.logs(3, 4, 0.0, histories.BOTH)
    write(own, log)
    subject = f"{own.topic_prefix}decisions-value"
    with served(own):
        client = client_of(own)
        assert subject in client.get_subjects()
        assert f"{own.topic_prefix}requests-foldflow.RunRequest" in client.get_subjects()
        assert client.get_versions(subject) == list(range(1, len(catalog.versions(Decision)) + 1))
        latest = client.get_latest_version(subject)
        assert (latest.schema_id, latest.version) == (DECISION.id, len(catalog.versions(Decision)))
        assert json.loads(latest.schema.schema_str or "") == DECISION.schema
        assert json.loads(client.get_schema(DECISION.id).schema_str or "") == DECISION.schema
        for number, own_id in enumerate(catalog.versions(Decision), 1):
            assert client.get_version(subject, number).schema_id == own_id
            assert [(each.subject, each.version) for each in client.get_schema_versions(own_id)] == [(subject, number)]
        pretty = Schema(json.dumps(DECISION.schema, indent=3), "AVRO")
        assert client.lookup_schema(subject, pretty).schema_id == DECISION.id
        assert client.register_schema(subject, pretty) == DECISION.id
        assert client.get_compatibility() == client.get_compatibility(subject) == "BACKWARD_TRANSITIVE"
        assert client.get_global_mode() == client.get_mode(subject) == "READONLY"
        assert (client.get_contexts(), client.get_schema_types()) == (["."], ["AVRO"])
        read = AvroDeserializer(client)
        with closing(kafka.reader(own)) as source:
            name = kafka.name(own, topics.DECISIONS)
            for message in kafka.read_partitions(source, name, dict.fromkeys(range(histories.PARTITIONS), 0)):
                said = read(message.value(), SerializationContext(name, MessageField.VALUE))
                found = next(
                    each.decision
                    for each in log.accepted
                    if (each.decision.run_id, each.decision.seq) == (said["run_id"], said["seq"])
                )
                assert (said["prev"], said["at"].timestamp() * 1000) == (found.prev, found.at)


OTHER = {"type": "record", "name": "Decision", "namespace": "foldflow", "fields": [{"name": "run_id", "type": "string"}]}
MORE = {**OTHER, "fields": [*OTHER["fields"], {"name": "mood", "type": "string"}]}
S = "{prefix}decisions-value"
REFUSED: dict[tuple[str, str], tuple[int, int, Any]] = {
    ("GET", "/schemas/ids/4711"): (404, 40403, None),
    ("GET", "/schemas/ids/x"): (404, 40403, None),
    ("GET", "/schemas/ids/99999999999999"): (404, 40403, None),
    ("GET", "/schemas/ids/4711/versions"): (404, 40403, None),
    ("GET", "/subjects/nothing/versions"): (404, 40401, None),
    ("GET", "/subjects/nothing/versions/latest"): (404, 40401, None),
    ("GET", f"/subjects/{S}/versions/99"): (404, 40402, None),
    ("GET", f"/subjects/{S}/versions/newest"): (422, 42202, None),
    ("GET", "/config/nothing"): (404, 40408, None),
    ("GET", "/mode/nothing"): (404, 40401, None),
    ("GET", "/associations/resources/x"): (404, 404, None),
    ("POST", "/subjects/nothing"): (404, 40401, {"schema": json.dumps(OTHER)}),
    ("POST", f"/subjects/{S}"): (404, 40403, {"schema": json.dumps(OTHER)}),
    ("POST", f"/subjects/{S}/versions"): (422, 42205, {"schema": json.dumps(OTHER)}),
    ("POST", f"/subjects/{S}/versions?normalize=true"): (422, 42201, {"schema": '{"type": "recrod"}'}),
    ("POST", f"/subjects/{S}/versions?a=b"): (422, 422, {"schemaType": "AVRO"}),
    ("PUT", "/config"): (405, 405, {"compatibility": "NONE"}),
    ("DELETE", f"/subjects/{S}"): (405, 405, None),
}


def test_what_is_not_there_or_would_change_something_is_refused_as_registries_do(own: Settings) -> None:
    """Each has the status and the code that clients know, in the registry's form and type; reads in other forms are answered."""
    with served(own) as client:

        def ask(method: str, path: str, body: Any = None) -> httpx.Response:
            return client.request(method, "/registry" + path.replace("{prefix}", own.topic_prefix), json=body)

        for (method, path), (status, code, body) in REFUSED.items():
            said = ask(method, path, body)
            assert (said.status_code, said.json()["error_code"]) == (status, code), (method, path, said.text)
            assert said.headers["content-type"] == TYPE
            assert said.json()["message"]
        assert ask("GET", "/").json() == {}
        by_id = ask("GET", f"/schemas/ids/{DECISION.id}?fetchMaxId=true&subject=any")
        assert by_id.headers["content-type"] == TYPE
        assert by_id.json()["maxId"] >= DECISION.id
        assert ask("GET", f"/schemas/ids/{DECISION.id}/schema").json() == DECISION.schema
        assert ask("GET", f"/schemas/ids/{DECISION.id}/subjects").json() == [S.replace("{prefix}", own.topic_prefix)]
        assert ask("GET", f"/subjects/{S}/versions/latest/schema").json() == DECISION.schema
        assert ask("GET", f"/subjects/{S}/versions/-1/referencedby").json() == []
        assert len(ask("GET", "/schemas").json()) > len(ask("GET", "/schemas?latestOnly=true").json()) > 10
        assert len(ask("GET", "/subjects?offset=1&limit=2").json()) == 2
        for candidate, fits in ((DECISION.schema, True), (OTHER, True), (MORE, False)):
            asked = {"schema": json.dumps(candidate)}
            said = ask("POST", f"/compatibility/subjects/{S}/versions/latest?verbose=true", asked).json()
            assert said["is_compatible"] is fits, said
            assert bool(said["messages"]) is not fits
            assert ask("POST", f"/compatibility/subjects/{S}/versions", asked).json()["is_compatible"] is fits


def test_what_newer_code_has_published_is_there_too(own: Settings) -> None:
    """Given a schema that only newer processes have, on the topic `schemas`, then its id is answered, as the next version."""
    newer = json.loads(json.dumps(catalog.ENTRIES[RunRequest].schema))
    newer["fields"].append({"name": "novelty", "type": "string", "default": ""})
    number, subject = catalog.fingerprint(newer), f"{own.topic_prefix}requests-foldflow.RunRequest"
    with served(own):
        client = client_of(own)
        assert client.get_latest_version(subject).schema_id != number
        entry = SchemaPublished(number, "RunRequest", json.dumps(newer))
        kafka.send(own, [envelope(topics.SCHEMAS, str(number), entry, source="test", identity=str(number))])

        def found() -> bool:
            try:
                return client_of(own).get_schema(number) is not None
            except SchemaRegistryError:
                return False

        until(found, 20)
        versions = client_of(own).get_versions(subject)
        assert client_of(own).get_version(subject, versions[-1]).schema_id == number


# --- Other languages ---


@pytest.fixture(scope="session")
def go_consumer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the consumer in Go."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    if not Path(go).exists():
        pytest.skip("Go is not installed: the consumer in another language is not built")
    binary = tmp_path_factory.mktemp("go") / "decisions"
    built = subprocess.run([go, "build", "-o", binary, "."], cwd=HERE / "foreign", capture_output=True, text=True, check=False)
    if built.returncode and re.search(r"dial tcp|no such host|i/o timeout|connection refused", built.stderr):
        pytest.skip(f"Go's modules can't be downloaded here: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    return binary


@pytest.mark.timeout(600)
@pytest.mark.thorough
def test_a_consumer_in_go_decodes_decisions_through_our_registry(own: Settings, go_consumer: Path) -> None:
    """Given decisions in Kafka, then franz-go, with its registry client and hamba/avro, reads each as what was decided."""
    log = histories.logs(4, 6, 0.0, histories.BOTH)
    write(own, log)
    with served(own):
        line = [
            go_consumer,
            own.bootstrap_servers,
            kafka.name(own, topics.DECISIONS),
            f"http://127.0.0.1:{own.api_port}/registry",
        ]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [json.loads(each) for each in done.stdout.splitlines()]
    wanted = {(each.decision.run_id, each.decision.seq): each.decision for each in log.accepted}
    assert len(said) == len(wanted)
    for each in said:
        decision = wanted[each["run_id"], each["seq"]]
        names = [f"foldflow.{type(effect).__name__}" for effect in decision.effects]
        assert (each["input"], each["effects"]) == (f"foldflow.{type(decision.input).__name__}", names)
        assert (each["prev"], each["at"]) == (decision.prev.hex(), decision.at)


# --- A real registry ---

APICURIO = "io.apicurio:apicurio-registry-app:2.5.11.Final:tar.gz:all"


@pytest.fixture(scope="session")
def registry_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Apicurio's registry, which Confluent's clients can talk to, and return its address."""
    if not (maven := shutil.which("mvn")) or not (java := shutil.which("java")):
        pytest.skip("Maven and Java are not installed: there is no real registry to test against")
    folder, port = tmp_path_factory.mktemp("apicurio"), free_port()
    got = subprocess.run(
        [maven, "-q", "-B", "dependency:copy", f"-Dartifact={APICURIO}", f"-DoutputDirectory={folder}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if got.returncode:
        pytest.skip(f"the registry can't be downloaded here: {got.stdout[-300:]}")
    subprocess.run(["tar", "xzf", *folder.glob("*.tar.gz")], cwd=folder, check=True)
    (jar,) = folder.glob("*-runner.jar")
    where = ["-Dquarkus.http.host=127.0.0.1", f"-Dquarkus.http.port={port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([java, "-Xmx400m", *where, "-jar", jar], cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
    try:
        until(lambda: _answers(url), 120)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/subjects").status_code == 200
    except httpx.HTTPError:
        time.sleep(0.3)
        return False


@pytest.mark.timeout(600)
@pytest.mark.thorough
@pytest.mark.usefixtures("restart")
def test_with_a_real_registry_its_ids_are_written_and_read(settings: Settings, registry_url: str) -> None:
    """Given a registry, then roles register all versions there and write its ids, a run goes its way, and everybody reads it.

    Confluent's client decodes `decisions` by the registry alone; so does our command, with the setting; and records that were
    written before, with the catalogue's ids, stay readable.
    """
    settings = Settings(**settings.model_dump(exclude={"ready_file"}, exclude_none=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOLDFLOW_")} | {
        "FOLDFLOW_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "FOLDFLOW_TOPIC_PREFIX": settings.topic_prefix,
        "FOLDFLOW_DATA_DIR": str(settings.data_dir),
        "FOLDFLOW_API_PORT": str(settings.api_port),
    }

    def foldflow(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(line, env=environment | more, capture_output=True, text=True, timeout=120, check=False)

    flow = settings.data_dir / "flow.yaml"
    flow.write_text("name: w\nsteps:\n  a: {tool: {name: echo, arguments: {value: 1}}}\n")
    roles = frozenset({"intake", "orchestrator", "tool"})
    with_registry = settings.model_copy(update={"schema_registry": {"url": registry_url}})
    given = {"FOLDFLOW_SCHEMA_REGISTRY": json.dumps(with_registry.schema_registry)}
    for made in (settings, with_registry):
        supervisor = Supervisor(made)
        supervisor.up(roles)
        try:
            more = given if made is with_registry else {}
            assert foldflow("deploy", str(flow), **more).returncode == 0
            ran = foldflow("run", "w", "--wait", "--request-id", f"with {len(more)}", **more)
            assert ran.returncode == 0, ran.stderr
        finally:
            supervisor.down()
    client, name = SchemaRegistryClient({"url": registry_url}), kafka.name(settings, topics.DECISIONS)
    assert client.get_compatibility(f"{name}-value") == "BACKWARD_TRANSITIVE"
    assert len(client.get_versions(f"{name}-value")) == len(catalog.versions(Decision))
    assert client.get_latest_version(f"{name}-value").schema_id < 1000
    ids, read, decoded = set(), AvroDeserializer(client), 0
    with closing(kafka.reader(settings)) as source:
        for message in kafka.read_partitions(source, name, dict.fromkeys(range(settings.partitions), 0)):
            number = int.from_bytes((message.value() or b"")[1:5])
            ids.add(number)
            if number != DECISION.id:
                said = read(message.value(), SerializationContext(name, MessageField.VALUE))
                decoded += said["seq"] > 0
    assert ids == {DECISION.id, client.get_latest_version(f"{name}-value").schema_id}
    assert decoded == 2
    shown = foldflow("tail", "decisions", "--no-follow", "--json", **given)
    assert shown.returncode == 0, shown.stderr
    assert [json.loads(each)["event"]["type"] for each in shown.stdout.splitlines()] == ["Decision"] * 4
    with served(with_registry) as api:
        assert {run["status"] for run in api.get("/runs").json()["runs"]} == {"completed"}
        assert len(api.get("/runs").json()["runs"]) == 2
        for number in ids:
            assert json.loads(api.get(f"/registry/schemas/ids/{number}").json()["schema"]) == DECISION.schema
