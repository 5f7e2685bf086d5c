"""The OpenAPI document: what FastAPI knows, and tokens, problems, examples and the headers that every answer has."""

import re
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.access import SECURITY
from api.problems import MEDIA_TYPE, Problem

_TAGS: Final = {
    "health": "Whether it is well, and how fresh the views are.",
    "runs": "Runs, their steps, calls, approvals, signals and decisions.",
    "lineage": "Where something comes from and what became of it, and pictures of runs.",
    "cost": "What calls cost: tokens of each kind and money, by what they are for.",
    "approvals": "What waits for people, and what they answered.",
    "dead letters": "Messages that couldn't be processed.",
    "sql": "Questions in SQL about all that the views hold.",
    "stream": "Decisions as they are accepted, live.",
    "requests": "Starting runs, and saying something to them.",
}
_EXAMPLE: Final = {
    "type": "urn:foldflow:unknown-run",
    "title": "There is no such run",
    "status": 404,
    "detail": "no run's id starts with 8f6a3a7e",
    "hint": "GET /runs lists all runs.",
    "instance": "/runs/8f6a3a7e",
}
_PROBLEM: Final = {
    "description": "A problem (RFC 9457): what is wrong, and under `hint` what to do about it.",
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}, "example": _EXAMPLE}},
}
_OURS: Final = "api__models__"
"""What FastAPI puts before the name of one of our models where a model of another module has the same."""
_FRESHNESS: Final = {
    "Foldflow-Lag": {"description": "Records that are in Kafka and not in this answer yet.", "schema": {"type": "integer"}},
    "Foldflow-Positions": {
        "description": "Up to which offset of each partition of `decisions` this answer was read: `partition:offset,…`.",
        "schema": {"type": "string"},
    },
}
_UNCHANGED: Final = {"304": {"description": "Nothing has changed since the answer with the ETag in `If-None-Match`."}}


def describe(app: FastAPI, examples: Mapping[str, Any], *, views: bool = True) -> None:
    """Make the app's document complete. `examples`: one for each model, by name; `views`: whether answers come from the views."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                separate_input_output_schemas=False,
            )
            _complete(made, examples, views=views)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # as FastAPI says it is to be done


def _complete(made: dict[str, Any], examples: Mapping[str, Any], *, views: bool) -> None:
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    components["securitySchemes"] = SECURITY
    schemas["ProblemDetails"] = Problem.model_json_schema() | {"title": "ProblemDetails"}
    for name, schema in schemas.items():
        if (example := {**examples, "ProblemDetails": _EXAMPLE}.get(name.removeprefix(_OURS))) is not None:
            schema.setdefault("examples", [example])
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    made["security"] = [{"bearer": []}, {}]
    used = {tag for path in made["paths"].values() for operation in path.values() for tag in operation.get("tags", ())}
    made["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items() if name in used]
    for path in made["paths"].values():
        for method, operation in path.items():
            _operation(method, operation, schemas, views=views)


def _operation(method: str, operation: dict[str, Any], schemas: Mapping[str, Any], *, views: bool) -> None:
    # The function's name is for us; what it says of itself in its first sentence is for the reader.
    said = operation.get("description", operation["summary"])
    operation["summary"] = re.split(r"(?<=[.:;])\s", said, maxsplit=1)[0].rstrip(".:;")
    answers = operation["responses"]
    answers.pop("422", None)
    for answer in answers.values():
        if views:
            answer["headers"] = _FRESHNESS | answer.get("headers", {})
        for content in answer.get("content", {}).values():
            named = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            for example in schemas.get(named, {}).get("examples", ())[:1]:
                content.setdefault("example", example)
    if views and method == "get":
        answers.update(_UNCHANGED)
    answers.update({kind: _PROBLEM for kind in ("4XX", "5XX") if kind not in answers})
