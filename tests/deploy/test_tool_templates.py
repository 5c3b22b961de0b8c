"""Which parser a checkpoint gets, and that its template is given what Transformers gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deploy.config import ConfigError, parse_args
from deploy.ingress import build_facts
from deploy.openai_schema import ChatRequest, parse_request
from deploy.prompts import chat_prompt
from deploy.resolve import resolve
from tests.deploy.http_client import post
from tests.deploy.test_tools_api import CONVERSATION, NOW, WEATHER, model_of
from tests.deploy.tool_checkpoints import checkpoint, served

MakeApi = Callable[..., Any]


@pytest.mark.parametrize("form", ["jamba", "hermes"])
def test_prompts_equal_transformers(form: str, tmp_path: Path) -> None:
    model = served(tmp_path, form)
    calls = [dict(call) for call in CONVERSATION[1]["tool_calls"]]
    calls[0]["function"] = {"name": "get_weather", "arguments": {"city": "Rome"}}
    # Transformers' own conventions: arguments are objects, and content is text.
    turn = {"role": "assistant", "content": "", "tool_calls": calls[:1]}
    result = {"role": "tool", "tool_call_id": "call_0", "content": "warm"}
    messages = [CONVERSATION[0], turn, result]
    oracle = AutoTokenizer.from_pretrained(model.path)
    expected = oracle.apply_chat_template(
        messages, tools=[WEATHER, NOW], add_generation_prompt=True, tokenize=False
    )
    sent = [
        CONVERSATION[0],
        {**turn, "content": None, "tool_calls": CONVERSATION[1]["tool_calls"][:1]},
        result,
    ]
    request = parse_request(ChatRequest, {"messages": sent, "tools": [WEATHER, NOW]})
    assert model.tokenizer is not None
    prompt = chat_prompt(model, request)
    assert model.tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == expected
    assert prompt.reading.reasoning_opened is (form == "hermes")


@pytest.mark.parametrize("form", ["jamba", "hermes", "json"])
async def test_tokenize_counts_tools(make_api: MakeApi, form: str, tmp_path: Path) -> None:
    model = model_of(form, tmp_path)
    body = {"messages": CONVERSATION, "tools": [WEATHER, NOW]}
    response = await post(make_api(model=model), "/tokenize", body)
    assert response.status_code == 200, response.text
    prompt = chat_prompt(model, parse_request(ChatRequest, body))
    assert response.json()["tokens"] == list(prompt.token_ids)


@pytest.mark.parametrize(
    ("model", "options", "tools", "reasoning"),
    [
        ("nano-jamba", {}, "json", "none"),
        ("jamba", {}, "jamba", "none"),
        ("hermes", {}, "hermes", "think"),
        ("hermes", {"tool_call_parser": "json", "reasoning_parser": "none"}, "json", "none"),
        ("nano-dbrx", {"tool_call_parser": "none", "reasoning_parser": "think"}, "none", "think"),
    ],
)
def test_parsers_follow_the_checkpoint_and_the_options(
    model: str, options: dict[str, str], tools: str, reasoning: str, tmp_path: Path
) -> None:
    folder = model if model.startswith("nano") else str(checkpoint(tmp_path, model))
    resolved = resolve(parse_args({"model": folder, **options}))
    facts = build_facts(resolved)
    assert (facts["tool_call_parser"], facts["reasoning_parser"]) == (tools, reasoning)


def test_parsers_that_cannot_work_fail_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="tool_call_parser=xml: allowed values are auto, jamba"):
        parse_args({"model": "nano-jamba", "tool_call_parser": "xml"})
    with pytest.raises(ConfigError, match=r"tool_call_parser=hermes.*auto, json, none"):
        resolve(parse_args({"model": "nano-jamba", "tool_call_parser": "hermes"}))
