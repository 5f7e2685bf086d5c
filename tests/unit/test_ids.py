import pytest
from confluent_kafka import Producer

from events import ids, topics
from events.topics import partition_for

KNOWN = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}
"""Values of Java's `Utils.murmur2`, from Kafka's own tests."""


@pytest.mark.parametrize("key", KNOWN, ids=bytes.decode)
def test_partition_is_that_of_java_clients(key: bytes) -> None:
    """A key's partition is Java's murmur2 without its sign, modulo the number of partitions."""
    for partitions in (1, 2, 7, 8, 1000, 2**31):
        assert partition_for(key, partitions) == (KNOWN[key] & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize("length", range(9))
def test_partition_of_short_and_odd_keys(length: int) -> None:
    """Every length of key has a partition, the empty key too."""
    assert 0 <= partition_for(b"\xff" * length, 8) < 8


def test_librdkafka_knows_the_partitioner_by_this_name() -> None:
    """`murmur2_random` is a partitioner of the installed librdkafka; another name is refused."""
    Producer({"partitioner": "murmur2_random"})
    with pytest.raises(Exception, match="partitioner"):
        Producer({"partitioner": "murmur3"})


def test_a_request_asked_twice_is_one_run() -> None:
    """A run's id derives from the request's id alone, and is fixed for all time."""
    assert ids.run_id("r") == ids.run_id("r") == "c569facc-675e-5163-bfed-1cfc039c49a4"
    assert ids.run_id("r") != ids.run_id("r ")


def test_a_topic_made_anew_does_not_repeat_old_runs() -> None:
    """The identity of a request without one names the topic by its id, its partition and its offset."""
    places = {ids.position_request_id(topic, p, o) for topic in (bytes(16), b"a" * 16) for p in (0, 1) for o in (0, 1)}
    assert len(places) == 8


def test_effect_ids_differ_by_decision_and_by_index() -> None:
    """A call's id derives from its decision's bytes and its place in them."""
    found = {ids.effect_id(ids.chain_hash(body), index) for body in (b"a", b"b") for index in range(300)}
    assert len(found) == 600
    assert all(len(each) == 32 for each in found)


def test_the_run_partition_is_what_producers_choose() -> None:
    """Topic `inbox` is partitioned by the run's id as text."""
    assert topics.INBOX.key == "run_id"
    assert partition_for(ids.run_id("r").encode(), 1) == 0
