"""The shapes of answers, for /openapi.json alone: answers themselves are built as plain dicts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from router.step import EngineLoad
from shards.client import WorkerStatus


class _Reply(BaseModel):
    # Fields that were asked for (`return_token_ids` ...) come beside these.
    model_config = ConfigDict(extra="allow")


class ErrorDetail(_Reply):
    """`param` is the name of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Reply):
    """OpenAI's error body."""

    error: ErrorDetail


class Usage(_Reply):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(_Reply):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None


class ChatChoice(_Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(_Reply):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    warnings: list[str] = []


class ChatChunkChoice(_Reply):
    """What is new of one answer."""

    index: int
    delta: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatCompletionChunk(_Reply):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(_Reply):
    """One continuation, or what is new of it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class TextCompletion(_Reply):
    """The answer of /v1/completions; each event of its stream has the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    warnings: list[str] = []


class ClassifiedInput(_Reply):
    """What the classification head says of one input."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(_Reply):
    """The answer of /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifiedInput]
    usage: Usage


class Tokens(_Reply):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Reply):
    """The answer of /detokenize."""

    prompt: str


class ModelCard(_Reply):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(_Reply):
    """All of one."""

    object: Literal["list"]
    data: list[ModelCard]


class Experts(_Reply):
    """Who holds what, and how much there is to do."""

    replica_id: str
    routing_table_version: int
    actors: list[WorkerStatus]
    load: EngineLoad
    kv_cache: str


class State(_Reply):
    """The model instance's state, and what keeps it from being ready."""

    state: Literal["starting", "ready", "recovering", "failed", "stopped"]


class AnyObject(_Reply):
    """Names and values as they are."""
