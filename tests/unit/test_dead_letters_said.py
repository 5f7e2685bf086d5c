"""A dead letter is logged by who writes it."""

from confluent_kafka import Producer
from structlog.testing import capture_logs

from streams import kafka
from streams.envelope import Incoming, dead_letter
from streams.settings import Settings


def test_a_dead_letter_is_logged_when_it_is_written() -> None:
    """Its reason and its place are in the log of who gave up on the record; no other record is."""
    nowhere = Producer({"bootstrap.servers": "127.0.0.1:9", "log_level": 0})
    letter = dead_letter(Incoming("requests", 2, 7, 1, b"k", b"{", {}), "invalid_json", "no JSON", "intake", run_id="r")
    with capture_logs() as said:
        kafka.produce(nowhere, Settings(), letter, kafka.Acks())
    nowhere.purge()
    assert said == [
        {
            "log_level": "warning",
            "event": "deadletter",
            "reason": "invalid_json",
            "detail": "no JSON",
            "at": "requests/2/7",
            "run_id": "r",
        }
    ]
