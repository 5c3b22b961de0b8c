"""Millions of bad entries in a request are one error, not millions: each takes time and memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from deploy.message_schema import Message
from deploy.openai_errors import ApiError
from deploy.openai_schema import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    GenerationRequest,
    parse_request,
)
from deploy.predicted_work import num_sequences, predicted_works
from deploy.tokenize_schema import DetokenizeRequest, TokenizeRequest
from deploy.tool_schema import ToolCall

MANY = 5000
MOST_ERRORS = 300
"""Some lists are short by their limit and report every entry, in every form they may have."""
MODELS: list[type[BaseModel]] = [
    ChatRequest,
    CompletionRequest,
    ClassifyRequest,
    TokenizeRequest,
    DetokenizeRequest,
    Message,
]
BAD: list[Any] = [[-1] * MANY, [None] * MANY, [{"a": 1}] * MANY, [[None]] * MANY]
BAD.append({str(i): "x" for i in range(MANY)})
BAD.append([[-1] * MANY, [None] * MANY])


def _num_errors(model: type[BaseModel], body: dict[str, Any]) -> int:
    try:
        model.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("model", MODELS)
def test_no_field_reports_every_entry(model: type[BaseModel]) -> None:
    for field in model.model_fields:
        for bad in BAD:
            assert _num_errors(model, {field: bad}) < MOST_ERRORS, field


@pytest.mark.parametrize("nested", [{"choice": [1] * MANY}, {"json": {"a": [None] * MANY}}])
def test_nor_do_structured_outputs(nested: dict[str, Any]) -> None:
    assert _num_errors(GenerationRequest, {"structured_outputs": nested}) < MOST_ERRORS


def test_the_number_of_biases_is_bounded() -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    fits = {str(i): 0.5 for i in range(1024)}
    assert parse_request(ChatRequest, {**body, "logit_bias": fits}).logit_bias == fits
    with pytest.raises(ApiError, match="1025 entries; allowed are 1024") as caught:
        parse_request(ChatRequest, {**body, "logit_bias": {**fits, "-": 0.5}})
    assert caught.value.param == "logit_bias"


def test_sequences_are_counted_as_they_will_be() -> None:
    for body in (
        {"prompt": ["a", "b"], "n": 3},
        {"prompt": [1, 2]},
        {"prompt": [[1], [2], [3]], "n": 2},
    ):
        completion = parse_request(CompletionRequest, body)
        assert num_sequences(completion) == len(predicted_works(completion))
    chat = parse_request(ChatRequest, {"messages": [{"role": "user", "content": "x"}], "n": 5})
    assert num_sequences(chat) == len(predicted_works(chat)) == 5
    classify = parse_request(ClassifyRequest, {"input": ["a", "b"]})
    assert num_sequences(classify) == len(predicted_works(classify)) == 2


def test_the_newer_name_of_max_tokens_is_what_is_predicted() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 7}
    (work,) = predicted_works(parse_request(ChatRequest, body))
    assert work.max_tokens == 7


@pytest.mark.parametrize("depth", [5, 985])
def test_arguments_too_deep_to_be_written_again_stay_text(depth: int) -> None:
    text = '{"a":' * depth + "1" + "}" * depth
    call = ToolCall.model_validate({"id": "1", "function": {"name": "f", "arguments": text}})
    arguments = call.for_template()["function"]["arguments"]
    assert arguments == (json.loads(text) if depth == 5 else text)


def test_fields_of_content_parts_are_named() -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    body = {"messages": [{"role": "user", "content": [part, part]}]}
    assert parse_request(ChatRequest, body).unknown_fields == ["messages.content.cache_control"]
    with pytest.raises(ApiError, match="cache_control"):
        parse_request(ChatRequest, body, strict=True)
