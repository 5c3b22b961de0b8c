"""What a request may take from the server before it is answered: bytes, and time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.http_options import HttpOptions
from deploy.http_replies import encode_json, error_response
from deploy.openai_errors import ApiError
from deploy.request_record import current_record

_LAST_WORDS_S = 1.0


async def read_body(request: Request, options: HttpOptions) -> bytes:
    """The body of a JSON request, never more of it than is allowed.

    Raises ApiError 408, 413 or 415, and ClientDisconnect.
    """
    _check_content_type(request.headers.get("content-type"))
    length = request.headers.get("content-length", "")
    # Digits only by HTTP's own rules, which the server checks; more of them than counts have
    # are too many bytes in any case.
    if length.isdecimal() and (len(length) > 18 or int(length) > options.max_request_bytes):
        raise _too_large(options)
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > options.max_request_bytes:
                    raise _too_large(options)
    except TimeoutError:
        raise _timed_out(
            f"The request's body did not come within {options.body_timeout_s:g} s."
        ) from None
    return bytes(body)


def _check_content_type(content_type: str | None) -> None:
    if not content_type:
        return
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    raise ApiError(
        f"Unsupported content type: {kind[:100]!r}. This API takes application/json only.",
        status=415,
        code="unsupported_content_type",
    )


def _too_large(options: HttpOptions) -> ApiError:
    return ApiError(
        f"The request's body is larger than {options.max_request_bytes} bytes.",
        status=413,
        code="request_too_large",
    )


def _timed_out(message: str) -> ApiError:
    # The connection may still carry the rest of a body: it is of no use for another request.
    return ApiError(
        message,
        status=408,
        kind="timeout_error",
        code="request_timeout",
        headers={"Connection": "close"},
    )


class RequestDeadline:
    """ASGI middleware: a request that has not been answered to the end in time ends with 408.

    A stream that has begun ends with the error as an event. Whatever ran for it is aborted.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a lifespan lasts as long as the server
            await self._app(scope, receive, send)
            return
        started: list[Message] = []

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            await send(message)

        deadline = asyncio.timeout(self._seconds)
        try:
            async with deadline:
                await self._app(scope, receive, noted)
        except TimeoutError:
            if not deadline.expired():
                raise
            error = _timed_out(f"The request was not answered within {self._seconds:g} s.")
            # Whoever does not read does not hear it either.
            async with asyncio.timeout(_LAST_WORDS_S):
                if started:
                    current_record().fail(error)
                    await send(_last_event(started[0], error))
                else:
                    await error_response(error)(scope, receive, send)


def _last_event(start: Message, error: ApiError) -> Message:
    """The end of a response that has begun; only streams of events can say why."""
    is_stream = (b"content-type", b"text/event-stream") in [
        (name.lower(), value.partition(b";")[0]) for name, value in start["headers"]
    ]
    event = b"data: " + encode_json(error.body()) + b"\n\ndata: [DONE]\n\n"
    return {
        "type": "http.response.body",
        "body": event if is_stream else b"",
        "more_body": False,
    }
