"""What reads the topics for the views, on a real Kafka: it doesn't stay deaf, and readers that are lent are whole."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from structlog.testing import capture_logs

from events import topics
from projections import source as source_module
from projections.source import Source
from streams import kafka
from streams.envelope import Incoming, dead_letter
from streams.lending import lent
from streams.settings import Settings


@pytest.fixture
def source(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """Read the topics of this test from their beginning, and look after 0.5 silent seconds."""
    monkeypatch.setattr(source_module, "_SILENCE_S", 0.5)
    monkeypatch.setattr(source_module, "_LOOK_EVERY_S", 0.1)
    kafka.connect(settings)
    made = Source(settings, source_module.found(settings))
    made.look()
    made.begin({})
    with closing(made):
        yield made


def write(settings: Settings, offset: int) -> None:
    """Write one record that the views read."""
    place = Incoming("elsewhere", 0, offset, 1, b"k", b"v", {})
    kafka.send(settings, [dead_letter(place, "internal", "a test", "test")])


AGAIN = 3
"""After what was waited for: rounds in which it could come a second time (more than the silence that makes a reader look)."""


def heard(source: Source) -> int:
    """Return how many dead letters come: wait for the first, then see whether there is a second."""
    found, until = 0, time.monotonic() + 30
    while not found and time.monotonic() < until:
        found += poll(source)
    return found + sum(poll(source) for _ in range(AGAIN))


def poll(source: Source) -> int:
    """Do what the views do in a round; return how many dead letters came."""
    found = len(source.poll().deadletters)
    source.check()
    return found


def test_a_reader_that_has_gone_deaf_is_replaced(settings: Settings, source: Source) -> None:
    """Given a consumer that gets nothing any more; when something is written; then the views hear it, each record once."""
    write(settings, 1)
    assert heard(source) == 1
    everything = [kafka.TopicPartition(kafka.name(settings, topics.TOPICS[topic]), each) for topic, each in source.ends]
    source._consumer.pause(everything)
    write(settings, 2)
    with capture_logs() as said:
        assert heard(source) == 1
    assert [each["event"] for each in said if each["log_level"] == "warning"].count("views.unheard") == 1
    write(settings, 3)
    assert heard(source) == 1


def test_silence_alone_replaces_nothing(source: Source) -> None:
    """Given topics on which nothing happens, then the consumer stays the same one."""
    before = source._consumer
    assert sum(poll(source) for _ in range(10)) == 0
    assert source._consumer is before


def test_who_begins_late_is_not_deaf(settings: Settings, source: Source) -> None:
    """Given a reader that was made long before it begins, as one that waits for a rebuild, then that was no silence."""
    write(settings, 1)
    before, source._heard, source._looked = source._consumer, 0.0, 0.0
    source.begin({})
    source.check()
    assert source._consumer is before
    assert heard(source) == 1


def test_a_reader_is_lent_again_unless_something_was_wrong(settings: Settings) -> None:
    """Given a reader that was given back, then the next one gets it, as new; not if its user failed, nor two at once."""
    kafka.connect(settings)
    write(settings, 1)
    topic = kafka.name(settings, topics.DEADLETTER)
    with lent(settings) as first:
        for _ in range(2):
            assert sum(len([*kafka.read_partition(first, topic, each, 0)]) for each in range(settings.partitions)) == 1
    with lent(settings) as again, lent(settings) as other:
        assert again is first
        assert other is not first
        assert sum(len([*kafka.read_partition(again, topic, each, 0)]) for each in range(settings.partitions)) == 1
    with pytest.raises(KeyError), lent(settings) as failing:
        raise KeyError
    with lent(settings) as after:
        assert after is not failing
