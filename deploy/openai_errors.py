"""Errors in the OpenAI body: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from shards.client import GroupUnavailable

Json = dict[str, Any]
_MAX_MESSAGE = 1000
_MAX_PARAM = 100


class ApiError(Exception):
    """What the caller gets instead of an answer. `param` is the name of the field at fault.

    A field at fault without a `code` of its own has `invalid_value`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = "invalid_value" if code is None and param is not None else code
        self.retry_after = retry_after
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        keywords = {key: value for key, value in vars(self).items() if key != "message"}
        return partial(type(self), self.message, **keywords), ()

    def body(self) -> Json:
        """The JSON object of the response."""
        return error_body(self.message, self.kind, self.param, self.code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """The OpenAI error object; what a client sent comes back shortened."""
    if param is not None:
        param = cut(param, _MAX_PARAM)
    shown = cut(message, _MAX_MESSAGE)
    return {"error": {"message": shown, "type": kind, "param": param, "code": code}}


def cut(text: str, most: int) -> str:
    """A text of at most `most` characters, the middle left out."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def internal_error() -> ApiError:
    """A defect of ours; the details are in the log, not in the answer."""
    return ApiError(
        "The server had an error while processing your request.",
        status=500,
        kind="server_error",
        code="internal_error",
    )


def not_finite() -> ApiError:
    """The model's own numbers are at fault: a NaN or an infinity among logits or scores."""
    return ApiError(
        "The model computed a value that is not finite (NaN or infinity).",
        status=500,
        kind="server_error",
        code="not_finite",
    )


def request_failed_worker() -> ApiError:
    """Computing this very request ends the process that computes it, every time."""
    return ApiError(
        "A worker died each time it computed this request; others are not affected.",
        status=500,
        kind="server_error",
        code="request_failed_worker",
    )


def reader_too_slow() -> ApiError:
    """A stream whose client does not read it."""
    return ApiError(
        "The stream was ended: its client reads it too slowly.",
        status=408,
        kind="timeout_error",
        code="client_too_slow",
    )


def recovering(error: GroupUnavailable) -> ApiError:
    """Waiting for the model instance to heal has taken too long."""
    return ApiError(
        str(error),
        status=503,
        kind="service_unavailable_error",
        code="model_recovering",
        retry_after=max(1, math.ceil(error.retry_after_s)),
    )
