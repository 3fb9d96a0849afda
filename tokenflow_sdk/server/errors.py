"""Errors as answers: HTTP status and OpenAI's envelope, `{"error": {message, type, code, param}}`."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tokenflow_sdk.errors import (
    ArgumentError,
    ArrayError,
    CodesError,
    ImageError,
    ImageTooLargeError,
    PagesExhausted,
    PromptError,
    RequestTimeoutError,
    TokenFlowError,
)

__all__ = ["REQUEST_ID", "ApiError", "answer_of", "api_error", "envelope", "handlers"]

REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="without id")
"""Id of the request that is being answered."""
_LOG = logging.getLogger("tokenflow_sdk.server")
_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "unprocessable",
    429: "overloaded",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
RETRY_AFTER = "1"
"""Seconds after which a client that was refused for lack of room should come again."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the person who wrote the client.
        code: for programs; None: the usual one of the status.
        param: field that is wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code or _CODES[status], param


def envelope(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return {
        "error": {
            "message": error.message,
            "type": kinds.get(error.status, kind),
            "code": error.code,
            "param": error.param,
        }
    }


def answer_of(error: ApiError) -> Response:
    """The response of an error."""
    headers = {"Retry-After": RETRY_AFTER} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(envelope(error), error.status, headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. What is no fault of the request is in the log only: it may name paths."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (RequestValidationError, ValidationError)):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        return ApiError(422, f"{where or 'The body'}: {first['msg'].removeprefix('Value error, ')}.", param=where or None)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.") if error.status_code in _CODES else ApiError(400, error.detail)
    if isinstance(error, ImageTooLargeError):
        return ApiError(413, error.message, "image_too_large")
    if isinstance(error, PagesExhausted):
        code = "too_many_images" if error.needed > error.total else None
        return ApiError(422 if code else 429, error.message, code)
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, "The request was not finished in time.")
    if isinstance(error, (ImageError, CodesError)):
        return ApiError(422, error.message)
    if isinstance(error, (ArgumentError, ArrayError, PromptError)):
        return ApiError(422, str(error))
    if not isinstance(error, TokenFlowError):
        _LOG.error("request %s failed", REQUEST_ID.get(), exc_info=error)
    else:
        _LOG.error("request %s failed: %s", REQUEST_ID.get(), error)
    return ApiError(500, "The request failed here, not for what it asked; the server's log says why.")


async def _handle(request: Request, error: Exception) -> Response:
    answer = answer_of(api_error(error))
    if isinstance(error, HTTPException):
        answer.headers.update(error.headers or {})  # Allow, beside 405
    return answer


def handlers() -> dict[Any, Any]:
    """Exception handlers of an app."""
    return dict.fromkeys((ApiError, TokenFlowError, RequestValidationError, ValidationError, HTTPException), _handle)
