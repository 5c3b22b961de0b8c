"""The HTTP face of ApiService: routes, server-sent events, API keys, errors in OpenAI's body."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.event_stream import EventStream, wait_for_disconnect
from deploy.metrics import CONTENT_TYPE
from deploy.openai_errors import ApiError, Json, error_body, internal_error
from deploy.patient_stream import PatientStream
from deploy.request_record import CLIENT_GONE, current_record
from deploy.request_scope import RequestScope
from deploy.service import ApiService
from shards.client import GroupState

log = logging.getLogger("conclave.ingress")

_OPEN_PATHS = frozenset({"/health", "/ready"})
T = TypeVar("T")
Route = Callable[[Request], Awaitable[Response]]


def build_api(
    service: ApiService, api_keys: tuple[str, ...] = (), *, behind_serve: bool = False
) -> FastAPI:
    """The ASGI application of one replica; an empty `api_keys` lets everyone in.

    Serve's proxy answers with the `x-request-id` itself.
    """
    app = FastAPI(title="Conclave", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    if api_keys:
        app.add_middleware(_ApiKeys, keys=api_keys)
    # The last one added is the first to see a request.
    app.add_middleware(
        RequestScope, metrics=service.metrics, routes=app.router, echoes=not behind_serve
    )

    def route(path: str, method: str) -> Callable[[Route], Route]:
        return lambda handler: app.api_route(path, methods=[method])(_guarded(handler))

    @route("/v1/chat/completions", "POST")
    async def chat(request: Request) -> Response:
        return await _generate(request, service.chat, service.keep_alive_s)

    @route("/v1/completions", "POST")
    async def completions(request: Request) -> Response:
        return await _generate(request, service.completions, service.keep_alive_s)

    @route("/classify", "POST")
    @route("/v1/classify", "POST")
    async def classify(request: Request) -> Response:
        return await _generate(request, service.classify, service.keep_alive_s)

    @route("/tokenize", "POST")
    async def tokenize(request: Request) -> Response:
        return await _generate(request, service.tokenize, service.keep_alive_s)

    @route("/detokenize", "POST")
    async def detokenize(request: Request) -> Response:
        return await _generate(request, service.detokenize, service.keep_alive_s)

    @route("/v1/models", "GET")
    async def models(request: Request) -> Response:
        return _json(service.models())

    @route("/v1/models/{name:path}", "GET")
    async def model(request: Request) -> Response:
        return _json(service.model(request.path_params["name"]))

    @route("/v1/experts", "GET")
    async def experts(request: Request) -> Response:
        return _json(service.experts())

    @route("/version", "GET")
    async def version(request: Request) -> Response:
        return _json(service.version())

    @route("/metrics", "GET")
    async def metrics(request: Request) -> Response:
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @route("/health", "GET")
    async def health(request: Request) -> Response:
        failed = service.state in (GroupState.FAILED, GroupState.STOPPED)
        return _json(service.health, 503 if failed else 200)

    @route("/ready", "GET")
    async def ready(request: Request) -> Response:
        is_ready = service.state is GroupState.READY
        headers = None if is_ready else {"Retry-After": "1"}
        return _json({"state": str(service.state)}, 200 if is_ready else 503, headers)

    return app


def encode_json(body: Json) -> bytes:
    """Compact UTF-8; a lone surrogate that a client sent goes back as the escape it came as."""
    try:
        return msgspec.json.encode(body)
    except (UnicodeEncodeError, TypeError):  # TypeError: NumPy's numbers
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _json(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(body), status, headers, "application/json")


def _error(error: ApiError) -> Response:
    current_record().fail(error)
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _json(error.body(), error.status, headers)


def _guarded(handler: Route) -> Route:
    """Every failure leaves as an OpenAI error, and ours also as a log record."""

    # Not `wraps`: FastAPI reads the signature, and annotations are strings here.
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            return _error(error)
        except ClientDisconnect:
            current_record().client_gone = True
            return Response(status_code=CLIENT_GONE)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return _error(internal_error())

    guarded.__name__ = handler.__name__
    guarded.__annotations__ = {"request": Request, "return": Response}
    return guarded


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}: {request.method} {request.url.path}"
    headers = dict(error.headers or {})
    return _json(error_body(message, kind, None, code), error.status_code, headers)


async def _generate(
    request: Request,
    answer: Callable[[object], Awaitable[Json | PatientStream]],
    keep_alive_s: float,
) -> Response:
    body = await _read_json(request)
    result = await _unless_disconnected(request, answer(body))
    if result is None:
        raise ClientDisconnect
    if isinstance(result, dict):
        return _json(result)
    return EventStream(_events(result), result, keep_alive_s)


async def _read_json(request: Request) -> object:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request body is not valid JSON: {error}") from error


async def _unless_disconnected(request: Request, answer: Awaitable[T]) -> T | None:
    """The answer, or None after cancelling it because the client is gone."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        gone.cancel()
        work.cancel()


async def _events(chunks: PatientStream) -> AsyncGenerator[bytes, None]:
    """Server-sent events; an error inside the stream is the last event before [DONE]."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        current_record().fail(error)
        yield _event(error.body())
    except Exception:
        log.exception("a stream failed")
        current_record().fail(internal_error())
        yield _event(internal_error().body())
    yield b"data: [DONE]\n\n"


def _event(body: Json) -> bytes:
    return b"data: " + encode_json(body) + b"\n\n"


class _ApiKeys:
    """Refuses requests without one of the keys; health checks stay open."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._open(scope) or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "Incorrect API key provided.",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
        )
        response = _error(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        # Behind Serve the path still carries the application's route prefix.
        return scope["path"].removeprefix(scope.get("root_path", "")) in _OPEN_PATHS

    def _allowed(self, scope: Scope) -> bool:
        header = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, given = header.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
