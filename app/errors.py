"""Errors that a client sees, always in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

ApiError          an answer with a status: what is wrong, where, and what to do
BackendError      the engine could not be reached, refused the request, or broke off (app.backends)
StoreError        the database (app.store)
"""

from __future__ import annotations

from typing import Any


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
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    """A 503 that says when to come back."""
    return ApiError(503, message, code=code, kind="server_error", retry_after=retry_after)
