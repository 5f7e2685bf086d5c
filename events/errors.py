"""Errors of the language, typed by what the caller should do."""


class EventError(Exception):
    """Something is wrong with an event or a schema."""


class NotDecodableError(EventError):
    """These bytes are no event that this code can read: keep them as a dead letter and go on."""


class UnknownSchemaError(NotDecodableError):
    """A well-framed value with a schema id that this code doesn't know: newer code wrote it, or somebody else."""


class CatalogError(EventError):
    """A schema and its dataclass differ, or a schema is missing: a mistake in this distribution."""
