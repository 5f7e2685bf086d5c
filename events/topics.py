"""The topics: names, keys, partitions, retention. Data only."""

import struct
from typing import Any, Final, Literal

from events.calls import CancelCall, LlmCall, ToolCall
from events.commands import RunRequest, WorkflowRegistered, WorkflowRequest
from events.decisions import DeadLetter, DeadLetterSettled, Decision, FinishedRun, FinishedRuns, SchemaPublished
from events.frozen import frozen
from events.results import InboxMessage
from events.snapshots import RunSnapshot
from events.workers import WorkerReported

HOUR_MS: Final = 60 * 60 * 1000
DAY_MS: Final = 24 * HOUR_MS
QUEUE_MS: Final = 7 * DAY_MS
FOREVER: Final = -1
MAX_VALUE_BYTES: Final = 8 * 1024 * 1024
"""Largest value of a record on any topic of ours."""


@frozen
class Topic:
    """One topic. `key`: what the key is; `retention_ms`: FOREVER keeps everything; `single`: one partition only.

    `kind`: what stands on it; `also`: what stands there too.
    """

    name: str
    kind: type[Any]
    key: str
    retention_ms: int = QUEUE_MS
    cleanup: Literal["delete", "compact", "compact,delete"] = "delete"
    compression: str = "producer"
    log_append_time: bool = False
    single: bool = False
    also: tuple[type[Any], ...] = ()

    def config(self) -> dict[str, str]:
        """Return the topic's settings in Kafka's words."""
        # Not at once: a reader who is on the way to a newer record must still find the older one. But some day: only closed
        # segments are compacted.
        compacted = {"min.compaction.lag.ms": str(HOUR_MS), "segment.ms": str(DAY_MS)} if "compact" in self.cleanup else {}
        return compacted | {
            "cleanup.policy": self.cleanup,
            "retention.ms": str(self.retention_ms),
            "compression.type": self.compression,
            "message.timestamp.type": "LogAppendTime" if self.log_append_time else "CreateTime",
            "max.message.bytes": str(MAX_VALUE_BYTES + 1024 * 1024),
        }


REQUESTS: Final = Topic("requests", WorkflowRequest, "any", also=(RunRequest,))
INBOX: Final = Topic("inbox", InboxMessage, "run_id", log_append_time=True)
DECISIONS: Final = Topic("decisions", Decision, "run_id", retention_ms=FOREVER, compression="zstd")
FINISHED: Final = Topic("finished", FinishedRun, "run_id", retention_ms=FOREVER, cleanup="compact", also=(FinishedRuns,))
SNAPSHOTS: Final = Topic("snapshots", RunSnapshot, "run_id/seq", retention_ms=FOREVER, cleanup="compact", compression="zstd")
LLM_CALLS: Final = Topic("llm.calls", LlmCall, "call_id")
TOOL_CALLS: Final = Topic("tool.calls", ToolCall, "call_id")
CANCELLATIONS: Final = Topic("cancellations", CancelCall, "call_id", retention_ms=DAY_MS, single=True)
SPECS: Final = Topic("specs", WorkflowRegistered, "digest", retention_ms=FOREVER, cleanup="compact", single=True)
WORKERS: Final = Topic("workers", WorkerReported, "worker_id", retention_ms=DAY_MS, cleanup="compact,delete", single=True)
SCHEMAS: Final = Topic("schemas", SchemaPublished, "schema id", retention_ms=FOREVER, cleanup="compact", single=True)
DEADLETTER: Final = Topic("deadletter", DeadLetter, "topic/partition/offset", retention_ms=FOREVER, also=(DeadLetterSettled,))
DECISIONS_JSON: Final = Topic("decisions.json", Decision, "run_id", retention_ms=FOREVER, compression="zstd")
"""What counts of `decisions`, as JSON: made by the role `mirror` where it runs, for tools that know no Avro."""

TOPICS: Final[dict[str, Topic]] = {
    topic.name: topic
    for topic in (
        *(REQUESTS, INBOX, DECISIONS, FINISHED, SNAPSHOTS, LLM_CALLS, TOOL_CALLS, CANCELLATIONS),
        *(SPECS, SCHEMAS, WORKERS, DEADLETTER),
    )
}


def partition_for(key: bytes, partitions: int) -> int:
    """Return the partition of a key, as Kafka's Java clients and librdkafka's `murmur2_random` choose it.

    Source: Apache Kafka, `org.apache.kafka.common.utils.Utils.murmur2`.
    """
    length, mask, m = len(key), 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ length) & mask
    for (k,) in struct.iter_unpack("<I", key[: length & ~3]):
        mixed = k * m & mask
        mixed = (mixed ^ (mixed >> 24)) * m & mask
        h = (h * m & mask) ^ mixed
    rest = key[length & ~3 :]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    h ^= h >> 15
    return (h & 0x7FFFFFFF) % partitions
