"""Problems as RFC 9457 says (`application/problem+json`): what is wrong, and under `hint` what to do about it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

MEDIA_TYPE: Final = "application/problem+json"
_NOT_FOUND: Final = 404


class Problem(BaseModel):
    """What is wrong (RFC 9457), and what to do about it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    hint: str
    instance: str | None = None


class ProblemError(Exception):
    """A problem to be answered. `kind`: its stable name, as in `unknown-run`; `more`: further members."""

    def __init__(
        self,
        status: int,
        kind: str,
        title: str,
        detail: str,
        hint: str,
        *,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.headers = headers
        self.problem = Problem(type=f"urn:foldflow:{kind}", title=title, status=status, detail=detail, hint=hint, **more)


def install(app: FastAPI, wrong_method: str, told: Mapping[type[Exception], Callable[[Exception], ProblemError]]) -> None:
    """Answer every error of the app as a problem.

    `wrong_method`: what to do instead of a method that isn't there; `told`: what other errors mean to who asks.
    """

    async def problem(request: Request, error: Exception) -> JSONResponse:
        kind = next((each for each in type(error).__mro__ if each in told), None)
        found = told[kind](error) if kind else error
        assert isinstance(found, ProblemError)
        return answer(request, found.problem, found.headers)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        hint = "GET /openapi.json lists what can be asked." if error.status_code == _NOT_FOUND else wrong_method
        detail = f"{request.method} {request.url.path}"
        found = Problem(type="about:blank", title=str(error.detail), status=error.status_code, detail=detail, hint=hint)
        return answer(request, found, error.headers)

    kinds: tuple[type[Exception], ...] = (ProblemError, *told)
    for kind in kinds:
        app.add_exception_handler(kind, problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, _fault)


def answer(request: HTTPConnection, problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return a problem as an answer."""
    content = problem.model_copy(update={"instance": request.url.path}).model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, problem.status, headers, MEDIA_TYPE)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return answer(
        request,
        Problem(
            type="urn:foldflow:invalid-request",
            title="The request is not valid",
            status=422,
            detail=wrong,
            hint="GET /openapi.json says what each part of it may be.",
        ),
    )


async def _fault(request: Request, error: Exception) -> JSONResponse:
    """Answer what nobody foresaw; the server logs it with its traceback."""
    return answer(
        request,
        Problem(
            type="urn:foldflow:fault",
            title="A fault of ours",
            status=500,
            detail=type(error).__name__,
            hint="The server's log says where it happened; please report it.",
        ),
    )
