"""Responses in JSON, and errors in OpenAI's body."""

from __future__ import annotations

import json
import math

import msgspec
from fastapi import Response

from deploy.openai_errors import ApiError, Json
from deploy.request_record import current_record


def encode_json(body: Json) -> bytes:
    """Compact UTF-8; a lone surrogate that a client sent goes back as the escape it came as."""
    try:
        return msgspec.json.encode(body)
    except (UnicodeEncodeError, TypeError):  # TypeError: NumPy's numbers
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(encode_json(body), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """The error with the headers that go with it, noted in the request's record.

    `retry-after-ms` is what OpenAI's clients read first, because Retry-After has whole seconds.
    """
    current_record().fail(error)
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, math.ceil(1000 * error.retry_after)))
    return json_response(error.body(), error.status, headers)
