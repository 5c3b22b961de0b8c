"""/openapi.json: every route with its request, its answers and its errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from deploy import openapi_replies as replies
from deploy.http_keys import OPEN_PATHS
from deploy.openai_errors import Json
from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest
from deploy.openapi_requests import complete_request_schema
from deploy.tokenize_schema import DetokenizeRequest, TokenizeRequest
from deploy.version import VERSION

_STATUSES = {
    400: "The request is malformed; `param` names the field at fault.",
    401: "No API key, or an unknown one.",
    404: "There is no such model.",
    408: "The body, or the answer, took longer than is allowed.",
    413: "The body is larger than is allowed.",
    415: "The body is not application/json.",
    429: "There is more to do than is admitted; Retry-After says when there will be room.",
    500: "A defect of the server or of the model's numbers.",
    503: "The model is not ready; Retry-After says when to come again.",
}
_ON_POST = (400, 404, 408, 413, 415, 429, 500, 503)
_RETRY = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route: POST if it takes a request, GET otherwise. `chunk` is a stream's event."""

    summary: str
    reply: type[BaseModel] = replies.AnyObject
    request: type[BaseModel] | None = None
    chunk: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    media_type: str = "application/json"


_CLASSIFY = Operation(
    summary="What the classification head says of each input.",
    request=ClassifyRequest,
    reply=replies.Classification,
    errors=_ON_POST,
)
OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation(
        summary="The next turn of a conversation.",
        request=ChatRequest,
        reply=replies.ChatCompletion,
        chunk=replies.ChatCompletionChunk,
        errors=_ON_POST,
    ),
    "/v1/completions": Operation(
        summary="Continuations of texts or token ids.",
        request=CompletionRequest,
        reply=replies.TextCompletion,
        chunk=replies.TextCompletion,
        errors=_ON_POST,
    ),
    "/v1/classify": _CLASSIFY,
    "/classify": _CLASSIFY,
    "/tokenize": Operation(
        summary="The tokens of a text or a chat.",
        request=TokenizeRequest,
        reply=replies.Tokens,
        errors=_ON_POST,
    ),
    "/detokenize": Operation(
        summary="The text of tokens.",
        request=DetokenizeRequest,
        reply=replies.Text,
        errors=_ON_POST,
    ),
    "/v1/models": Operation(summary="The models that are served.", reply=replies.ModelList),
    "/v1/models/{name}": Operation(summary="One of them.", reply=replies.ModelCard, errors=(404,)),
    "/v1/experts": Operation(summary="Every actor and what it holds.", reply=replies.Experts),
    "/version": Operation(summary="What decides the bits of an answer."),
    "/health": Operation(
        summary="Whether the server is alive; healing is not ill health.", reply=replies.State
    ),
    "/ready": Operation(summary="Whether it can answer now.", reply=replies.State),
    "/metrics": Operation(summary="Prometheus metrics.", media_type="text/plain"),
    "/openapi.json": Operation(summary="This document."),
}


def openapi_document(
    routes: Iterable[tuple[str, str]], *, api_keys: bool = False, strict: bool = False
) -> Json:
    """The document for (path, method) pairs; what is not described is named all the same."""
    wanted = sorted(
        (path.replace(":path}", "}"), method)
        for path, method in routes
        if method != "HEAD" or path in OPEN_PATHS
    )
    described = [_operation(path, method) for path, method in wanted]
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Conclave",
            "version": VERSION,
            "description": "An OpenAI-compatible API; extensions have vLLM's names.",
        },
        "paths": {},
        "components": {"schemas": _schemas(described, strict=strict)},
    }
    for (path, method), operation in zip(wanted, described, strict=True):
        is_open = path in OPEN_PATHS
        entry = _entry(path, method, operation, guarded=api_keys and not is_open)
        if method == "HEAD":
            for answer in entry["responses"].values():
                del answer["content"]
        document["paths"].setdefault(path, {})[method.lower()] = entry
    if api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(path: str, method: str) -> Operation:
    request = replies.AnyObject if method == "POST" else None
    errors = _ON_POST if method == "POST" else ()
    return OPERATIONS.get(path) or Operation(summary=path, request=request, errors=errors)


def _schemas(operations: Iterable[Operation], *, strict: bool) -> Json:
    operations = list(operations)
    requests = {each.request for each in operations if each.request is not None}
    answers = {each.reply for each in operations} | {replies.Error}
    answers |= {each.chunk for each in operations if each.chunk is not None}
    inputs = [(model, "validation") for model in requests]
    outputs = [(model, "validation") for model in answers - requests]
    ordered: Any = sorted([*inputs, *outputs], key=lambda pair: pair[0].__name__)
    _, built = models_json_schema(ordered, ref_template="#/components/schemas/{model}")
    schemas: Json = built["$defs"]
    for model in requests - {replies.AnyObject}:
        complete_request_schema(schemas, model, strict=strict)
    return schemas


def _entry(path: str, method: str, operation: Operation, *, guarded: bool) -> Json:
    entry: Json = {
        "summary": operation.summary,
        "operationId": f"{method.lower()}_{path.strip('/').replace('/', '_') or 'root'}",
        "responses": {"200": _answer(operation), **_errors(path, operation, guarded=guarded)},
        "security": [{"key": []}] if guarded else [],
    }
    if operation.request is not None:
        content = {"application/json": {"schema": _ref(operation.request)}}
        entry["requestBody"] = {"required": True, "content": content}
    if "{name}" in path:
        schema = {"type": "string", "minLength": 1}
        entry["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    return entry


def _answer(operation: Operation) -> Json:
    schema = _ref(operation.reply)
    if operation.media_type != "application/json":
        schema = {"type": "string"}
    content: Json = {operation.media_type: {"schema": schema}}
    description = "The answer."
    if operation.chunk is not None:
        chunk = _ref(operation.chunk)["$ref"].rpartition("/")[2]
        description = (
            f"The answer; with `stream` server-sent events, each `data: ` with a {chunk} or an "
            "Error, and `data: [DONE]` at the end."
        )
        # No schema: a tool that reads events would hold each of them to it.
        content["text/event-stream"] = {}
    return {"description": description, "content": content}


def _errors(path: str, operation: Operation, *, guarded: bool) -> Json:
    statuses = {*operation.errors, *([401] if guarded else [])}
    found = {str(status): _error(status) for status in sorted(statuses)}
    if path in OPEN_PATHS:
        # Not an error body: the state says it all.
        content = {"application/json": {"schema": _ref(operation.reply)}}
        found["503"] = {"description": "It is not.", "content": content}
    return found


def _error(status: int) -> Json:
    content = {"application/json": {"schema": _ref(replies.Error)}}
    entry: Json = {"description": _STATUSES[status], "content": content}
    if status in (429, 503):
        entry["headers"] = _RETRY
    return entry


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
