"""Errors as the OpenAI API has them, and JSON."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from paxattn.serving import NotServing, QueueFull


class ApiError(Exception):
    """What the client is told.

    Attributes:
        status: of HTTP.
        headers: further ones.
        body: ``{"error": {"message", "type", "param", "code"}}``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """``param``: the field at fault; ``code``: a word for programs."""
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        elif status >= 500:
            kind = "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Json(Response):
    """A response in ASCII: what a client sent, half characters too, can be quoted in it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """ASCII, in one line."""
    return json.dumps(content, separators=(",", ":")).encode()


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        return ApiError(error.detail, status=error.status_code, headers=headers)
    if isinstance(error, QueueFull):
        return ApiError(
            "the server is busy: every place in its queue is taken; try again later",
            status=429,
            code="queue_full",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, NotServing):
        return ApiError(str(error), status=503)
    return ApiError("the server failed to answer this request", status=500)  # its log has the rest


async def on_error(request: Request, error: Exception) -> Response:
    """The response to any exception."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path[:200]}"
        error.detail = (
            f"{asked}: there is POST /v1/completions and /v1/chat/completions, and GET /v1/models, "
            "/health and /metrics"
        )
    told = as_api_error(error)
    return Json(told.body, status_code=told.status, headers=told.headers)
