"""Answers against the openai package's own types, strictly: nothing missing, wrong or unnamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from openai import BaseModel
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs

# What vLLM's clients read and OpenAI's types do not have.
EXTENSIONS = {
    "warnings",
    "token_ids",
    "prompt_token_ids",
    "prompt_logprobs",
    "reasoning_content",
    "root",
    "parent",
    "max_model_len",
}


def check(
    kind: type[BaseModel], body: dict[str, Any], *, extensions: set[str] | None = None
) -> Any:
    """The validated object; the raw `body` may have `extensions` beside the type's own fields."""
    found = kind.model_validate(_with_sdk_types(kind, body), strict=True)
    allowed = EXTENSIONS if extensions is None else extensions
    unnamed = set(_extras(found)) - allowed
    assert not unnamed, f"{kind.__name__} has no {sorted(unnamed)}"
    return found


def check_chat(body: dict[str, Any], **options: Any) -> ChatCompletion:
    """A whole chat completion."""
    found = check(ChatCompletion, body, **options)
    assert isinstance(found, ChatCompletion)
    assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
    assert found.usage is not None
    return found


def check_completion(body: dict[str, Any], **options: Any) -> Completion:
    """A whole completion."""
    found = check(Completion, body, **options)
    assert isinstance(found, Completion)
    assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
    assert found.usage is not None
    return found


def check_model(body: dict[str, Any]) -> Model:
    """An entry of the list of models."""
    found = check(Model, body)
    assert isinstance(found, Model)
    return found


def check_chat_chunks(bodies: list[dict[str, Any]], num: int = 1) -> list[ChatCompletionChunk]:
    """A whole stream: one role and one end per choice, in that order, all of one answer."""
    chunks = [check(ChatCompletionChunk, body) for body in bodies]
    for index in range(num):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert mine[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in mine[1:])
        assert [choice.finish_reason is None for choice in mine].count(False) == 1
        assert mine[-1].finish_reason is not None
    _check_one_answer(bodies)
    return chunks


def check_completion_chunks(bodies: list[dict[str, Any]], num: int = 1) -> list[Completion]:
    """A whole stream of a completion."""
    chunks = [check(Completion, body) for body in bodies]
    for index in range(num):
        mine = [c for body in bodies for c in body["choices"] if c["index"] == index]
        assert [choice["finish_reason"] is None for choice in mine].count(False) == 1
        assert mine[-1]["finish_reason"] is not None
    _check_one_answer(bodies)
    return chunks


def _check_one_answer(bodies: list[dict[str, Any]]) -> None:
    for key in ("id", "object", "created", "model", "system_fingerprint"):
        assert len({body[key] for body in bodies}) == 1, key
    # A chunk with the usage alone, where one was asked for, is the last.
    assert all(body["choices"] for body in bodies[:-1])
    assert bodies[-1]["choices"] or bodies[-1]["usage"]


def _with_sdk_types(kind: type[BaseModel], body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's own API sends two nulls that its package's types do not have; so do we, and no more.

    A streamed completion's `finish_reason` before its end, and the first log-probability of an
    echoed prompt, whose first token nothing predicts.
    """
    if kind is not Completion:
        return body
    choices = []
    for choice in body["choices"]:
        choice = {**choice, "logprobs": _without_first_null(choice["logprobs"])}
        if choice["finish_reason"] is None:
            choice["finish_reason"] = "stop"
        choices.append(choice)
    return {**body, "choices": choices}


def _without_first_null(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    if logprobs is None or logprobs["token_logprobs"][:1] != [None]:
        return logprobs
    assert set(logprobs) == set(Logprobs.model_fields)
    return {key: values and values[1:] for key, values in logprobs.items()}


def _extras(value: object) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _extras(entry)
