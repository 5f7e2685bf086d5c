"""A dead letter is logged by who makes it."""

from structlog.testing import capture_logs

from streams.envelope import Incoming, dead_letter


def test_a_dead_letter_is_logged() -> None:
    """Its reason and the record's place are in the log of who gave up on the record."""
    with capture_logs() as said:
        dead_letter(Incoming("requests", 2, 7, 1, b"k", b"{", {}), "invalid_json", "no JSON", "intake", run_id="r")
    expected = {"reason": "invalid_json", "detail": "no JSON", "source": "intake", "at": "requests/2/7", "run_id": "r"}
    assert said == [{"log_level": "warning", "event": "deadletter", **expected}]
