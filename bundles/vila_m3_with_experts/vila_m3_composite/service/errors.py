"""Errors in OpenAI's form."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vila_m3_common.errors import UserError, near_match_hint

logger = logging.getLogger(__name__)

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
    507: "server_error",
}
# A file system without room, a quota, a limit of the process.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what was given, what is allowed, what to do.
        code: short name that a program can test for.
        param: the field of the request that is meant.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """Return how an exception is told to a client; faults of the program without their details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        is_long = "tokens, the model reads" in str(error)
        return ApiError(400, str(error), "context_length_exceeded" if is_long else "invalid_value")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return ApiError(507, "the server has no room for more files; try again later", "insufficient_storage")
    return ApiError(500, f"the server failed ({type(error).__name__}); the request was not answered", "internal_error")


@contextmanager
def room_checked() -> Iterator[None]:
    """Turn a full disk into an :class:`ApiError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise as_api_error(error) from error
        raise


def respond(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response of an error."""
    extra = {"Retry-After": "5"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, {**extra, **(headers or {})})


def install_handlers(app: FastAPI) -> None:
    """Answer every error of an application in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(UserError)
    async def on_user_error(request: Request, error: UserError) -> JSONResponse:
        return respond(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_describe_invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else None
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path[:200]}: {message}; see /openapi.json for what there is"
        return respond(ApiError(error.status_code, message, code), error.headers)

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> JSONResponse:
        return respond(as_api_error(error))


def _describe_invalid(problems: Sequence[Any]) -> ApiError:
    """Tell the first problem of a request in words; what the client sent is not repeated."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place)[:200] or None
    if problem["type"] == "extra_forbidden":
        from .schemas import PARAMETERS

        hint = near_match_hint(place[-1], PARAMETERS) if len(place) == 1 else ""
        return ApiError(400, f"unknown parameter {param!r}; {hint}".rstrip("; "), "unknown_parameter", param)
    if problem["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON", "invalid_json")
    return ApiError(400, f"{param or 'the body'}: {problem['msg']}", "invalid_value", param)
