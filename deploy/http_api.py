"""The HTTP face of ApiService: routes, server-sent events, API keys, errors in OpenAI's body."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.event_stream import EventStream, wait_for_disconnect
from deploy.http_cors import Cors
from deploy.http_keys import ApiKeys
from deploy.http_limits import RequestDeadline, read_body
from deploy.http_options import HttpOptions
from deploy.http_replies import encode_json, error_response, json_response
from deploy.lost_clients import LostClients
from deploy.metrics import CONTENT_TYPE
from deploy.openai_errors import ApiError, Json, internal_error
from deploy.openapi import openapi_document
from deploy.patient_stream import PatientStream
from deploy.request_json import decode_json
from deploy.request_record import CLIENT_GONE, current_record
from deploy.request_scope import RequestScope
from deploy.service import ApiService
from shards.client import GroupState

log = logging.getLogger("conclave.ingress")

T = TypeVar("T")
Route = Callable[[Request], Awaitable[Response]]
Answering = Callable[[object], Awaitable[Json | PatientStream]]


def build_api(
    service: ApiService,
    api_keys: tuple[str, ...] = (),
    options: HttpOptions | None = None,
    *,
    behind_serve: bool = False,
    lost_client: tuple[type[Exception], ...] = (),
) -> FastAPI:
    """The ASGI application of one replica; an empty `api_keys` lets everyone in.

    Serve's proxy answers with the `x-request-id` itself. `lost_client` is what `receive` raises
    when the client has left, if it does not just say so.
    """
    options = options or HttpOptions()
    app = FastAPI(title="Conclave", openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    # The last one added is the first to see a request.
    if options.request_timeout_s is not None:
        app.add_middleware(RequestDeadline, seconds=options.request_timeout_s)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    if options.cors_origins:
        app.add_middleware(Cors, origins=options.cors_origins)
    if lost_client:
        app.add_middleware(LostClients, errors=lost_client)
    app.add_middleware(
        RequestScope,
        metrics=service.metrics,
        routes=app.router,
        echoes=not behind_serve,
        tracing=service.tracing,
    )

    def route(path: str, method: str) -> Callable[[Route], Route]:
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        return lambda handler: app.api_route(path, methods=methods)(_guarded(handler))

    async def generate(request: Request, answer: Answering) -> Response:
        service.check_room()  # before the body is read: it may be large
        return await _generate(request, answer, options, service.keep_alive_s)

    @route("/v1/chat/completions", "POST")
    async def chat(request: Request) -> Response:
        return await generate(request, service.chat)

    @route("/v1/completions", "POST")
    async def completions(request: Request) -> Response:
        return await generate(request, service.completions)

    @route("/classify", "POST")
    @route("/v1/classify", "POST")
    async def classify(request: Request) -> Response:
        return await generate(request, service.classify)

    @route("/tokenize", "POST")
    async def tokenize(request: Request) -> Response:
        return await _generate(request, service.tokenize, options, service.keep_alive_s)

    @route("/detokenize", "POST")
    async def detokenize(request: Request) -> Response:
        return await _generate(request, service.detokenize, options, service.keep_alive_s)

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

    @route("/metrics", "GET")
    async def metrics(request: Request) -> Response:
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

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
            current_record().client_gone = True
            return Response(status_code=CLIENT_GONE)
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
    status = error.status_code
    return error_response(
        ApiError(message, status=status, kind=kind, code=code, headers=error.headers)
    )


async def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(internal_error())


async def _generate(
    request: Request, answer: Answering, options: HttpOptions, keep_alive_s: float
) -> Response:
    body = decode_json(await read_body(request, options))
    result = await _unless_disconnected(request, answer(body))
    if result is None:
        raise ClientDisconnect
    if isinstance(result, dict):
        return json_response(result)
    return EventStream(_events(result), result, keep_alive_s)


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
