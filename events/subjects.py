"""Under which subjects a registry keeps our schemas.

What a topic is for has the subject `<topic>-value` (TopicNameStrategy), which every client derives by itself. What else stands on
the topic is a record of another name, with versions of its own: `<topic>-<full name>` (TopicRecordNameStrategy).
"""

from typing import Any, Final

from events.catalog import NAMESPACE
from events.topics import TOPICS

COMPATIBILITY: Final = "BACKWARD_TRANSITIVE"
"""What tests hold every change of a schema to: whoever has today's reads all that was ever written."""


def subjects(prefix: str) -> dict[str, type[Any]]:
    """Return the record type of each subject; `prefix`: of the topics."""
    found: dict[str, type[Any]] = {}
    for topic in TOPICS.values():
        found[f"{prefix}{topic.name}-value"] = topic.kind
        found |= {f"{prefix}{topic.name}-{NAMESPACE}.{kind.__name__}": kind for kind in topic.also}
    return found
