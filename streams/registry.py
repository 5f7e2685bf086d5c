"""The registry of workflow versions: a view of the compacted topic `specs`. It ends in front of what newer code registered."""

from typing import NamedTuple

from confluent_kafka import Consumer

from events import codec, topics
from events.commands import WorkflowRegistered
from events.errors import NewerCodeError, NotDecodableError
from streams import kafka, schemas
from streams.envelope import envelope
from streams.patience import Patience
from streams.settings import Settings
from streams.workflow.spec import WorkflowSpec, digest, from_canonical


class Version(NamedTuple):
    """A registered version of a workflow. `registered`: when, milliseconds since the epoch; `current`: see WorkflowRegistered."""

    name: str
    digest: str
    registered: int
    current: bool


class SpecRegistry:
    """Workflow versions by digest and the newest by name, as far as they were read. For one thread."""

    def __init__(self, settings: Settings, known: schemas.Schemas | None = None) -> None:
        self._schemas = known or schemas.Schemas(settings)
        self._topic = kafka.name(settings, topics.SPECS)
        self._source: Consumer = kafka.reader(settings, **kafka.FOLLOWS)
        self._source.assign([kafka.TopicPartition(self._topic, 0, 0)])
        self._next = 0
        self._canonical: dict[str, str] = {}
        self._compiled: dict[str, WorkflowSpec | None] = {}
        self._newest: dict[str, str] = {}
        self._versions: dict[str, Version] = {}

    def refresh(self, timeout_s: float = 120.0) -> None:
        """Read on to the end of the topic as of now. Raises KafkaUnreachableError and NewerCodeError."""
        _, end = kafka.watermarks(self._source, self._topic, 0, timeout_s)
        waiting = Patience(f"{self._topic} from offset {self._next} on", timeout_s)
        while self._next < end:
            self.drain(0.1)
            waiting.check()

    def drain(self, timeout_s: float = 0.0) -> None:
        """Take what has come since the last look; wait for it at most so long.

        Raises NewerCodeError, and KafkaUnreachableError where it must ask who wrote something.
        """
        for message in self._source.consume(kafka.BATCH, timeout_s):
            if message.error() is None:
                offset = message.offset() or 0
                try:
                    self._take(offset, message.value(), message.timestamp()[1])
                except (NewerCodeError, kafka.KafkaUnreachableError):
                    self._source.seek(kafka.TopicPartition(self._topic, 0, offset))  # who asks again meets it again
                    raise
                self._next = offset + 1
            else:
                self._next = max(self._next, message.offset() or 0)  # the end; behind compacted records too

    def _take(self, offset: int, value: bytes | None, at: int) -> None:
        try:
            registered = codec.decode(value, WorkflowRegistered)
        except NotDecodableError as error:
            self._schemas.refuse_newer(f"workflow version {self._topic}/0/{offset}", value, WorkflowRegistered)
            kafka.log.warning("specs.unreadable", offset=offset, problem=str(error))
            return
        if digest(registered.spec) != registered.digest:
            kafka.log.warning("specs.forged", name=registered.name, digest=registered.digest)
            return
        if registered.current and not self._usable(registered):
            return
        self._canonical[registered.digest] = registered.spec
        self._versions.pop(registered.digest, None)  # registered again, it is a later one
        self._versions[registered.digest] = Version(registered.name, registered.digest, at, registered.current)
        if registered.current:
            self._newest[registered.name] = registered.digest

    def _usable(self, registered: WorkflowRegistered) -> bool:
        """Whether a definition is one, of that name, to this code: a wrong one must not become a workflow's newest version."""
        spec = self._compile(registered.digest, registered.spec)
        if spec is not None and spec.name != registered.name:
            kafka.log.warning("specs.forged", name=registered.name, digest=registered.digest)
            return False
        return spec is not None

    def _compile(self, version: str, canonical: str) -> WorkflowSpec | None:
        if version not in self._compiled:
            try:
                self._compiled[version] = from_canonical(canonical)
            except Exception as error:  # noqa: BLE001 - the digest proves who wrote it as little as that it is a definition
                kafka.log.warning("specs.unusable", digest=version, problem=str(error))
                self._compiled[version] = None
        return self._compiled[version]

    def get(self, version: str) -> WorkflowSpec | None:
        """Return a version, None if it isn't known (yet), or is no definition to this code."""
        canonical = self._canonical.get(version)
        return None if canonical is None else self._compile(version, canonical)

    def newest(self, workflow: str) -> WorkflowSpec | None:
        """Return the newest version of a workflow, None if there is none (yet)."""
        version = self._newest.get(workflow)
        return self.get(version) if version else None

    def versions(self, workflow: str) -> list[Version]:
        """Return all versions of a workflow, in the order in which they were (last) registered."""
        return [version for version in self._versions.values() if version.name == workflow]

    def names(self) -> list[str]:
        """Return the names of all workflows."""
        return sorted(self._newest)

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


def publish(settings: Settings, specs: list[WorkflowSpec], *, current: bool = True) -> list[WorkflowSpec]:
    """Register versions that are not the newest of their names, and return those.

    `current` False: versions for those who name them by their digest; they don't become the newest.
    """
    registry = SpecRegistry(settings)
    try:
        registry.refresh()
        if current:
            new = [spec for spec in specs if (newest := registry.newest(spec.name)) is None or newest.digest != spec.digest]
        else:
            new = [spec for spec in specs if registry.get(spec.digest) is None]
    finally:
        registry.close()
    records = [
        envelope(
            topics.SPECS,
            spec.digest,
            WorkflowRegistered(spec.name, spec.digest, spec.canonical, current),
            source="registry",
            identity=spec.digest,
        )
        for spec in new
    ]
    if records:
        schemas.publish(settings)
        kafka.send(settings, records)
    return new
