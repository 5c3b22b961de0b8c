"""The HTTP face of ApiService: routes, server-sent events, API keys, errors in OpenAI's body."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.http_cors import Cors
from deploy.http_keys import ApiKeys
from deploy.http_limits import RequestDeadline, read_body
from deploy.http_options import HttpOptions
from deploy.http_replies import encode_json, error_response, json_response
from deploy.openai_errors import ApiError, Json, error_body, internal_error
from deploy.openapi import openapi_document
from deploy.request_json import decode_json
from deploy.service import ApiService
from shards.client import GroupState

log = logging.getLogger("conclave.ingress")

_CLIENT_CLOSED = 499
T = TypeVar("T")
Route = Callable[[Request], Awaitable[Response]]


def build_api(
    service: ApiService, api_keys: tuple[str, ...] = (), options: HttpOptions | None = None
) -> FastAPI:
    """The ASGI application of one replica; an empty `api_keys` lets everyone in."""
    options = options or HttpOptions()
    app = FastAPI(title="Conclave", openapi_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    # The last one added is the first to see a request.
    if options.request_timeout_s is not None:
        app.add_middleware(RequestDeadline, seconds=options.request_timeout_s)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    if options.cors_origins:
        app.add_middleware(Cors, origins=options.cors_origins)

    def route(path: str, method: str) -> Callable[[Route], Route]:
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        return lambda handler: app.api_route(path, methods=methods)(_guarded(handler))

    @route("/v1/chat/completions", "POST")
    async def chat(request: Request) -> Response:
        return await _generate(request, service, service.chat, options)

    @route("/v1/completions", "POST")
    async def completions(request: Request) -> Response:
        return await _generate(request, service, service.completions, options)

    @route("/classify", "POST")
    @route("/v1/classify", "POST")
    async def classify(request: Request) -> Response:
        return await _generate(request, service, service.classify, options)

    @route("/tokenize", "POST")
    async def tokenize(request: Request) -> Response:
        return await _generate(request, service, service.tokenize, options)

    @route("/detokenize", "POST")
    async def detokenize(request: Request) -> Response:
        return await _generate(request, service, service.detokenize, options)

    @route("/v1/models", "GET")
    async def models(request: Request) -> Response:
        return json_response(service.models())

    @route("/v1/models/{name:path}", "GET")
    async def model(request: Request) -> Response:
        return json_response(service.model(request.path_params["name"]))

    @route("/v1/experts", "GET")
    async def experts(request: Request) -> Response:
        return json_response(service.experts())

    @route("/version", "GET")
    async def version(request: Request) -> Response:
        return json_response(service.version())

    @route("/health", "GET")
    async def health(request: Request) -> Response:
        failed = service.state in (GroupState.FAILED, GroupState.STOPPED)
        return json_response(service.health, 503 if failed else 200)

    @route("/ready", "GET")
    async def ready(request: Request) -> Response:
        is_ready = service.state is GroupState.READY
        headers = None if is_ready else {"Retry-After": "1"}
        return json_response({"state": str(service.state)}, 200 if is_ready else 503, headers)

    @functools.cache
    def document() -> Json:
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        served = [(route.path, method) for route in routes for method in route.methods or ()]
        return openapi_document(served, api_keys=bool(api_keys), strict=service.strict)

    @route("/openapi.json", "GET")
    async def openapi(request: Request) -> Response:
        return json_response(document())

    return app


def _guarded(handler: Route) -> Route:
    """Every failure leaves as an OpenAI error, and ours also as a log record."""

    # Not `wraps`: FastAPI reads the signature, and annotations are strings here.
    async def guarded(request: Request) -> Response:
        try:
            response = await handler(request)
            if request.method == "HEAD":  # all but the body, its length included
                response.body = b""
            return response
        except ApiError as error:
            return error_response(error)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return error_response(internal_error())

    guarded.__name__ = handler.__name__
    guarded.__annotations__ = {"request": Request, "return": Response}
    return guarded


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}: {request.method[:20]} {request.url.path}"
    headers = dict(error.headers or {})
    return json_response(error_body(message, kind, None, code), error.status_code, headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(internal_error())


async def _generate(
    request: Request,
    service: ApiService,
    answer: Callable[[object], Awaitable[Json | AsyncGenerator[Json, None]]],
    options: HttpOptions,
) -> Response:
    service.check_room()  # before the body is read: it may be large
    body = decode_json(await read_body(request, options))
    result = await _unless_disconnected(request, answer(body))
    if result is None:
        return Response(status_code=_CLIENT_CLOSED)
    if isinstance(result, dict):
        return json_response(result)
    return StreamingResponse(
        _events(result),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _unless_disconnected(request: Request, answer: Awaitable[T]) -> T | None:
    """The answer, or None after cancelling it because the client is gone."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        gone.cancel()
        work.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _events(chunks: AsyncGenerator[Json, None]) -> AsyncGenerator[bytes, None]:
    """Server-sent events; an error inside the stream is the last event before [DONE]."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield b"data: " + encode_json(chunk) + b"\n\n"
        except ApiError as error:
            yield b"data: " + encode_json(error.body()) + b"\n\n"
        except Exception:
            log.exception("a stream failed")
            yield b"data: " + encode_json(internal_error().body()) + b"\n\n"
    yield b"data: [DONE]\n\n"
