"""Errors that a client sees, always in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

ApiError          an answer with a status: what is wrong, where, and what to do
BackendError      the engine could not be reached, refused the request, or broke off (app.backends)
StoreError        the database (app.store)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An HTTP error answer; `retry_after` in seconds becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.retry_after, self.headers = retry_after, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = self.headers | ({} if self.retry_after is None else {"retry-after": str(self.retry_after)})
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def response(self) -> JSONResponse:
        """The answer with its status and the headers that go with it."""
        return JSONResponse(self.body, self.status, self.all_headers)


class TokenRefused(ApiError):
    """A token of an issuer's that opens nothing; reason is its label in the metrics."""

    def __init__(self, message: str, reason: str = "token", status: int = 401, code: str = "invalid_token"):
        super().__init__(status, message, code=code)
        self.reason = reason


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    """A 503 that says when to come back."""
    return ApiError(503, message, code=code, kind="server_error", retry_after=retry_after)


def store_down() -> ApiError:
    """A 503 for what cannot be read or written now."""
    return unavailable("The database cannot be used just now; try again in a while.", "store_down", 5)


def internal() -> ApiError:
    """A 500, which tells nothing of what went wrong: that is in the log."""
    return ApiError(500, "Something went wrong on our side.", code="internal_error", kind="server_error")


def client_gone() -> ApiError:
    """What is logged and counted for a client that did not wait for its answer; nobody reads it."""
    return ApiError(499, "The client went away.", code="client_gone")
