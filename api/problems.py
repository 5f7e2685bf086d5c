"""Problems as RFC 9457 says (`application/problem+json`): what is wrong, and under `hint` what to do about it."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api.models import Problem
from projections.database import ViewsError
from projections.log import RecordGoneError
from projections.projector import NotReadyError
from streams.kafka import KafkaUnreachableError

MEDIA_TYPE = "application/problem+json"


class ProblemError(Exception):
    """A problem to be answered. `kind`: its stable name, as in `unknown-run`; `more`: further members."""

    def __init__(self, status: int, kind: str, title: str, detail: str, hint: str, **more: Any) -> None:
        super().__init__(detail)
        self.problem = Problem(type=f"urn:foldflow:{kind}", title=title, status=status, detail=detail, hint=hint, **more)


def install(app: FastAPI) -> None:
    """Answer every error of the app as a problem."""
    app.add_exception_handler(ProblemError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(NotReadyError, _not_ready)
    app.add_exception_handler(KafkaUnreachableError, _not_ready)
    app.add_exception_handler(ViewsError, _not_ready)
    app.add_exception_handler(RecordGoneError, _gone)


def _answer(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    freshness: dict[str, str] = getattr(request.state, "freshness", {})
    content = problem.model_copy(update={"instance": request.url.path}).model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, problem.status, {**freshness, **(headers or {})}, MEDIA_TYPE)


async def _told(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    return _answer(request, error.problem)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return _answer(
        request,
        Problem(
            type="urn:foldflow:invalid-request",
            title="The request is not valid",
            status=422,
            detail=wrong,
            hint="GET /openapi.json says what each parameter may be.",
        ),
    )


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    hint = "This API only answers questions (GET); runs are started by a record on the topic `requests`: `foldflow run`."
    if error.status_code == 404:  # noqa: PLR2004 - HTTP's own numbers
        hint = "GET /openapi.json lists what can be asked."
    problem = Problem(
        type="about:blank",
        title=str(error.detail),
        status=error.status_code,
        detail=f"{request.method} {request.url.path}",
        hint=hint,
    )
    return _answer(request, problem, error.headers)


async def _not_ready(request: Request, error: Exception) -> JSONResponse:
    problem = Problem(
        type="urn:foldflow:not-ready",
        title="The views can't be asked yet",
        status=503,
        detail=str(error),
        hint="Try again: it goes on by itself, and GET /health says how far it is. "
        "Without progress, check that Kafka runs (`foldflow status`) and that there is room in FOLDFLOW_DATA_DIR.",
    )
    return _answer(request, problem, {"Retry-After": "2"})


async def _gone(request: Request, error: Exception) -> JSONResponse:
    problem = Problem(
        type="urn:foldflow:record-gone",
        title="The record is no longer in the log",
        status=410,
        detail=str(error),
        hint="Records of `decisions` are kept for ever unless a retention was set or the topic was made anew.",
    )
    return _answer(request, problem)
