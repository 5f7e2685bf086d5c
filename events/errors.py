"""Errors of the language, typed by what the caller should do."""


class EventError(Exception):
    """Something is wrong with an event or a schema."""


class NotDecodableError(EventError):
    """These bytes are no event that this code can read: keep them as a dead letter and go on."""


class UnknownSchemaError(NotDecodableError):
    """A well-framed value with a schema id that this code doesn't know: newer code wrote it, or somebody else."""

    def __init__(self, schema_id: int) -> None:
        super().__init__(f"schema id {schema_id} is not known")
        self.schema_id = schema_id


class NewerCodeError(EventError):
    """A record that newer code wrote: who passes over it loses it. Stop in front of it, and upgrade this process."""

    def __init__(self, where: str, schema_id: int) -> None:
        super().__init__(f"{where} was written by newer code (schema id {schema_id}): upgrade this process")


class CatalogError(EventError):
    """A schema and its dataclass differ, or a schema is missing: a mistake in this distribution."""
