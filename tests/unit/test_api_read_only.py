"""No producer can exist in the process of `foldflow api`."""

import subprocess
import sys
from pathlib import Path

PROBE = """
import asyncio, gc, sys
import uvicorn
from confluent_kafka import cimpl

HELD = [cimpl.Producer]

def serve(self):
    import confluent_kafka
    from confluent_kafka import cimpl
    from confluent_kafka.admin import AdminClient
    from events import topics
    from infra.cli.read_only import ReadOnlyProcessError
    from streams import kafka, schemas
    from streams.envelope import Outgoing
    from streams.settings import Settings

    settings, address = Settings(), {"bootstrap.servers": "127.0.0.1:9"}
    async def make_aio(address):
        from confluent_kafka.aio import AIOProducer
        AIOProducer(address)

    record = Outgoing(topics.REQUESTS, b"", b"", [])
    attempts = {
        "Producer": lambda: confluent_kafka.Producer(address),
        "cimpl.Producer": lambda: cimpl.Producer(address),
        "SerializingProducer": lambda: confluent_kafka.SerializingProducer(address),
        "AIOProducer": lambda: asyncio.run(make_aio(address)),
        "kafka.producer": lambda: kafka.producer(settings),
        "kafka.send": lambda: kafka.send(settings, [record]),
        "create_topics": lambda: AdminClient(address).create_topics([]),
        "delete_topics": lambda: kafka.admin(settings).delete_topics(["x"]),
        "delete_records": lambda: kafka.admin(settings).delete_records([]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ReadOnlyProcessError:
            print("refused", name)
        except Exception as error:  # anything else is no refusal
            print("went on", name, repr(error))
        else:
            print("made", name)
    print("producers", [kind for kind in map(type, gc.get_objects()) if issubclass(kind, HELD[0])])
    self.started = True

uvicorn.Server.run = serve
sys.argv = ["foldflow", "api"]
from infra.cli.main import main
main()
"""


def test_whatever_wants_to_write_in_the_api_process_is_refused(tmp_path: Path) -> None:
    """Given the process that `foldflow api` makes, each way to a producer, and to changing topics, raises; none is there."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
        env={"FOLDFLOW_DATA_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in lines[:-1]] == ["refused"] * 9, done.stdout
    assert lines[-1] == "producers []"
