"""Every field of OpenAI's and vLLM's requests is served, ignored by definition, warned about or
refused: none is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat
from openai.types.shared import ReasoningEffort as TheirEffort

from deploy.openai_schema import ChatRequest, CompletionRequest, ReasoningEffort, StreamOptions
from deploy.unsupported import (
    _INSTEAD,
    IGNORED_FIELDS,
    REFUSED_FIELDS,
    REMOVED_FIELDS,
    WITHOUT_EFFECT,
)
from tests.deploy.http_client import post

MakeApi = Callable[..., Any]
USER = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
OPENAI = {
    ChatRequest: get_type_hints(chat.CompletionCreateParamsBase).keys() | {"stream"},
    CompletionRequest: get_type_hints(completion_create_params.CompletionCreateParamsBase).keys()
    | {"stream"},
}
# vLLM 0.32, and names that releases before it had.
VLLM = {
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "best_of",
    "cache_salt",
    "ec_transfer_params",
    "echo",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "length_penalty",
    "logits_processors",
    "logprob_token_ids",
    "media_io_kwargs",
    "min_p",
    "min_tokens",
    "mm_payload",
    "mm_processor_kwargs",
    "priority",
    "prompt_embeds",
    "prompt_logprobs",
    "reasoning_effort",
    "repetition_detection",
    "repetition_penalty",
    "request_id",
    "response_format",
    "return_mm_kwargs",
    "return_prompt_text",
    "return_routed_experts",
    "return_token_ids",
    "return_token_offsets",
    "return_tokens_as_token_ids",
    "routed_experts_prompt_start",
    "session_id",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "stream_interval",
    "structured_outputs",
    "thinking_token_budget",
    "top_k",
    "truncate_prompt_tokens",
    "truncation_side",
    "use_beam_search",
    "vllm_xargs",
    "watermarking",
}
VLLM_CHAT = {
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "max_completion_tokens",
}


def known(kind: type[ChatRequest] | type[CompletionRequest]) -> set[str]:
    return {*kind.model_fields, *IGNORED_FIELDS, *REFUSED_FIELDS, *REMOVED_FIELDS, *WITHOUT_EFFECT}


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_no_field_of_the_sdk_or_of_vllm_is_unknown(kind: type[ChatRequest]) -> None:
    assert OPENAI[kind] >= {"model", "temperature", "stream", "user"}
    own = VLLM_CHAT if kind is ChatRequest else set()
    assert not (OPENAI[kind] | VLLM | own) - known(kind)
    # The lists do not overlap: each field has one fate.
    assert not IGNORED_FIELDS & (REFUSED_FIELDS.keys() | WITHOUT_EFFECT.keys())
    assert not REFUSED_FIELDS.keys() & WITHOUT_EFFECT.keys()
    assert _INSTEAD.keys() <= REFUSED_FIELDS.keys()


def test_allowed_values_are_the_sdks() -> None:
    options = get_type_hints(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam)
    assert options.keys() <= StreamOptions.model_fields.keys()
    [theirs] = [arg for arg in get_args(TheirEffort) if get_args(arg)]
    assert set(get_args(ReasoningEffort)) == set(get_args(theirs))


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS.keys() - ChatRequest.model_fields.keys()))
async def test_refused_fields_say_what_is_allowed(make_api: MakeApi, field: str) -> None:
    response = await post(make_api(), CHAT, {"messages": USER, field: {"odd": [1]}})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "allowed values: " in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 1),
        ("use_beam_search", False),
        ("length_penalty", 1.0),
        ("echo", False),
        ("tools", []),
        ("verbosity", "medium"),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("kv_transfer_params", {}),
        ("return_routed_experts", False),
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", False),
        ("service_tier", "auto"),
        ("moderation", None),
        ("stream_options", None),
    ],
)
async def test_values_that_ask_for_nothing_pass_without_a_word(
    make_api: MakeApi, field: str, value: Any
) -> None:
    response = await post(make_api(), CHAT, {"messages": USER, field: value})
    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"request_id": "x"}, "request_id"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"temprature": 1}, "temprature"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd"),
    ],
)
async def test_fields_without_effect_are_named(
    make_api: MakeApi, body: dict[str, Any], named: str
) -> None:
    response = await post(make_api(), CHAT, {"messages": USER, **body})
    assert response.status_code == 200, response.text
    text = (
        response.text.split("\n")[0].removeprefix("data: ") if "stream" in body else response.text
    )
    assert f'"warnings":["{"unknown field " if named == "temprature" else ""}' in text
    assert named in text.split('"warnings"')[1]
    assert "has no effect" in text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"return_routed_experts": True}, "return_routed_experts"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ],
)
async def test_fields_of_chat_are_checked(
    make_api: MakeApi, body: dict[str, Any], param: str
) -> None:
    response = await post(make_api(), CHAT, {"messages": USER, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_removed_names_say_what_to_use(make_api: MakeApi) -> None:
    for field, value, use in (
        ("best_of", 2, "use n"),
        ("use_beam_search", True, "use n with a temperature"),
        ("length_penalty", 0.5, "use max_tokens"),
    ):
        for path, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": [5]})):
            response = await post(make_api(), path, {**body, field: value})
            assert use in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [5, 6, 7]),
        ({"truncate_prompt_tokens": 30}, [5, 6, 7, 8, 9, 10]),
        ({"truncate_prompt_tokens": -1}, [5, 6, 7, 8, 9, 10]),
    ],
)
async def test_prompts_are_cut_on_request(
    make_api: MakeApi, options: dict[str, Any], kept: list[int]
) -> None:
    api = make_api()
    body = {"prompt": [5, 6, 7, 8, 9, 10], "echo": True, "return_token_ids": True, **options}
    reply = (await post(api, "/v1/completions", body)).json()
    assert [list(prompt) for prompt in api.client.prompts] == [kept]
    assert reply["prompt_token_ids"] == kept
    assert reply["usage"]["prompt_tokens"] == len(kept)
    assert reply["choices"][0]["text"] == api.model.tokenizer.decode(kept) + "Hello there"


async def test_a_long_prompt_is_cut_to_leave_room(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 256)
    for asked, room in (({}, 16), ({"max_tokens": 100}, 100)):
        body = {"prompt": [*range(5, 305)], "truncate_prompt_tokens": -1, **asked}
        response = await post(api, "/v1/completions", body)
        assert response.status_code == 200, response.text
        assert api.client.prompts.pop() == tuple(range(305 - 256 + room, 305))
    chat = [{"role": "user", "content": "word " * 500}]
    response = await post(api, CHAT, {"messages": chat, "truncate_prompt_tokens": -1})
    assert response.status_code == 200, response.text
    assert len(api.client.prompts.pop()) == 255
