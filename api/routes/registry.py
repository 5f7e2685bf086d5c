"""The read endpoints of a schema registry, below `/registry`, for tools that expect one: consumers, web UIs.

An application of its own, since its errors are the registry's (`error_code`, `message`), not problem+json. It is read-only: a
schema that is known already can be "registered", which answers with its id, as producers ask before they write.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from events.subjects import COMPATIBILITY
from projections.registry import InvalidSchemaError, Known, Registry, Version, obstacles
from streams.settings import Settings

PATH: Final = "/registry"
_LATEST: Final = ("latest", "-1")


class Answer(JSONResponse):
    """JSON as registries call it."""

    media_type = "application/vnd.schemaregistry.v1+json"


class RefusedError(Exception):
    """An error of the registry. `code`: 5 digits, of which the first 3 are the HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Candidate(BaseModel):
    """A schema that somebody asks about."""

    text: str = Field(alias="schema")
    kind: str = Field("AVRO", alias="schemaType")


def create(settings: Settings) -> FastAPI:
    """Return the application; it is to be mounted at `PATH`."""
    app = FastAPI(openapi_url=None, default_response_class=Answer, title="Foldflow's schemas")
    app.state.registry = Registry(settings)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(InvalidSchemaError, _invalid)
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(HTTPException, _http)
    for path, answer in _GET.items():
        app.add_api_route(path, answer, methods=["GET"])
    for path, answer in _POST.items():
        app.add_api_route(path, answer, methods=["POST"])
    return app


def _known(request: Request) -> Known:
    registry: Registry = request.app.state.registry
    return registry.known()


TheKnown = Annotated[Known, Depends(_known)]

# --- What is asked for, found or not ---


def _by_id(known: Known, schema_id: str) -> Version:
    version = known.ids.get(int(schema_id)) if schema_id.isascii() and schema_id.isdigit() and len(schema_id) < 11 else None  # noqa: PLR2004 - int32
    if version is None:
        raise RefusedError(40403, f"Schema {schema_id} not found")
    return version


def _subject(known: Known, subject: str) -> list[Version]:
    if subject not in known.subjects:
        raise RefusedError(40401, f"Subject '{subject}' not found.")
    return known.subjects[subject]


def _version(known: Known, subject: str, version: str) -> Version:
    versions = _subject(known, subject)
    if version in _LATEST:
        return versions[-1]
    if not (version.isascii() and version.isdigit()):
        raise RefusedError(42202, f"The specified version '{version}' is not a valid version id.")
    found = next((each for each in versions if str(each.version) == version), None)
    if found is None:
        raise RefusedError(40402, f"Version {version} not found.")
    return found


def _same(known: Known, subject: str, candidate: Candidate) -> Version | None:
    return known.same(subject, candidate.text) if candidate.kind == "AVRO" else None


def _told(version: Version) -> dict[str, Any]:
    return {"subject": version.subject, "version": version.version, "id": version.id, "schema": version.schema}


# --- Answers ---


def _nothing() -> dict[str, Any]:
    return {}


def _schema_by_id(known: TheKnown, schema_id: str, *, fetchMaxId: bool = False) -> dict[str, Any]:  # noqa: N803 - as it is called
    version = _by_id(known, schema_id)
    return {"schema": version.schema, **({"maxId": max(known.ids)} if fetchMaxId else {})}


def _text_by_id(known: TheKnown, schema_id: str) -> Answer:
    return _text(_by_id(known, schema_id))


def _versions_of_id(known: TheKnown, schema_id: str) -> list[dict[str, Any]]:
    version = _by_id(known, schema_id)
    return [{"subject": version.subject, "version": version.version}]


def _subjects_of_id(known: TheKnown, schema_id: str) -> list[str]:
    return [_by_id(known, schema_id).subject]


def _all(
    known: TheKnown,
    *,
    subjectPrefix: str = "",  # noqa: N803 - as it is called
    latestOnly: bool = False,  # noqa: N803
    offset: int = 0,
    limit: int = -1,
) -> list[dict[str, Any]]:
    found = [
        _told(each)
        for each in known.all()
        if each.subject.startswith(subjectPrefix) and (not latestOnly or each is known.subjects[each.subject][-1])
    ]
    return _page(found, offset, limit)


def _subjects(known: TheKnown, subjectPrefix: str = "", offset: int = 0, limit: int = -1) -> list[str]:  # noqa: N803
    return _page([each for each in sorted(known.subjects) if each.startswith(subjectPrefix)], offset, limit)


def _page(found: list[Any], offset: int, limit: int) -> list[Any]:
    rest = found[max(0, offset) :]
    return rest if limit < 0 else rest[:limit]


def _versions(known: TheKnown, subject: str) -> list[int]:
    return [each.version for each in _subject(known, subject)]


def _one(known: TheKnown, subject: str, version: str) -> dict[str, Any]:
    return _told(_version(known, subject, version))


def _text_of_one(known: TheKnown, subject: str, version: str) -> Answer:
    return _text(_version(known, subject, version))


def _text(version: Version) -> Answer:
    answer = Answer(None)
    answer.body = version.schema.encode()  # as it is: what hashes it must get the same bytes each time
    answer.headers["content-length"] = str(len(answer.body))
    return answer


def _referenced_by(known: TheKnown, subject: str, version: str) -> list[int]:
    _version(known, subject, version)
    return []  # each schema is written out whole: there are no references


def _lookup(known: TheKnown, subject: str, candidate: Candidate) -> dict[str, Any]:
    _subject(known, subject)
    found = _same(known, subject, candidate)
    if found is None:
        raise RefusedError(40403, "Schema not found")
    return _told(found)


def _register(known: TheKnown, subject: str, candidate: Candidate) -> dict[str, Any]:
    found = _same(known, subject, candidate) if subject in known.subjects else None
    if found is None:
        raise RefusedError(
            42205, f"Subject {subject} is in READONLY mode: its schemas are those that Foldflow's processes have published"
        )
    return {"id": found.id}


def _level() -> dict[str, str]:
    return {"compatibilityLevel": COMPATIBILITY}


def _level_of(known: TheKnown, subject: str) -> dict[str, str]:
    if subject not in known.subjects:
        raise RefusedError(40408, f"Subject '{subject}' does not have subject-level compatibility configured")
    return _level()


def _mode() -> dict[str, str]:
    return {"mode": "READONLY"}


def _mode_of(known: TheKnown, subject: str) -> dict[str, str]:
    _subject(known, subject)
    return _mode()


def _types() -> list[str]:
    return ["AVRO"]


def _contexts() -> list[str]:
    return ["."]


def _compatible(known: TheKnown, subject: str, version: str, candidate: Candidate) -> dict[str, Any]:
    return _judged(obstacles(candidate.text, _version(known, subject, version)))


def _compatible_with_all(known: TheKnown, subject: str, candidate: Candidate) -> dict[str, Any]:
    return _judged([each for version in _subject(known, subject) for each in obstacles(candidate.text, version)])


def _judged(found: list[str]) -> dict[str, Any]:
    return {"is_compatible": not found, "messages": found}


_GET: Final[dict[str, Callable[..., Any]]] = {
    "/": _nothing,
    "/schemas": _all,
    "/schemas/types": _types,
    "/schemas/ids/{schema_id}": _schema_by_id,
    "/schemas/ids/{schema_id}/schema": _text_by_id,
    "/schemas/ids/{schema_id}/versions": _versions_of_id,
    "/schemas/ids/{schema_id}/subjects": _subjects_of_id,
    "/subjects": _subjects,
    "/subjects/{subject}/versions": _versions,
    "/subjects/{subject}/versions/{version}": _one,
    "/subjects/{subject}/versions/{version}/schema": _text_of_one,
    "/subjects/{subject}/versions/{version}/referencedby": _referenced_by,
    "/config": _level,
    "/config/{subject}": _level_of,
    "/mode": _mode,
    "/mode/{subject}": _mode_of,
    "/contexts": _contexts,
}
_POST: Final[dict[str, Callable[..., Any]]] = {
    "/subjects/{subject}": _lookup,
    "/subjects/{subject}/versions": _register,
    "/compatibility/subjects/{subject}/versions": _compatible_with_all,
    "/compatibility/subjects/{subject}/versions/{version}": _compatible,
}

# --- Errors ---


def _error(status: int, code: int, message: str) -> Answer:
    return Answer({"error_code": code, "message": message}, status)


async def _refused(_request: Request, error: Exception) -> Answer:
    assert isinstance(error, RefusedError)
    return _error(error.code // 100, error.code, str(error))


async def _invalid(_request: Request, error: Exception) -> Answer:
    return _error(422, 42201, str(error))


async def _unreadable(_request: Request, error: Exception) -> Answer:
    assert isinstance(error, RequestValidationError)
    return _error(422, 422, "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()))


async def _http(request: Request, error: Exception) -> Answer:
    # What we don't have is not found; new Java clients ask for associations and need exactly that.
    assert isinstance(error, HTTPException)
    return _error(
        error.status_code, error.status_code, f"HTTP {error.status_code} {error.detail}: {request.method} {request.url.path}"
    )
