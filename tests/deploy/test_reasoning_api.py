"""Reasoning over HTTP, beside content, calls, counts and stop strings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.served_model import ServedModel
from tests.deploy.conftest import say
from tests.deploy.test_tools_api import (
    CALLS,
    WEATHER,
    accumulated,
    ask,
    chunks_of,
    scripted,
)
from tests.deploy.tool_checkpoints import served

MakeApi = Callable[..., Any]
THOUGHT = 'One <tool_call>{"name": "f", "arguments": {}}</tool_call> two.'


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    return served(tmp_path, "hermes")


async def test_reasoning_is_no_content(make_api: MakeApi, model: ServedModel) -> None:
    text = f"{THOUGHT}\n</think>\n\nSo."
    body = await ask(scripted(make_api, model, text))
    [choice] = body["choices"]
    assert choice["message"]["reasoning_content"] == THOUGHT
    assert choice["message"]["content"] == "So."
    assert "tool_calls" not in choice["message"]
    num_thoughts = len(say(model, f"{THOUGHT}\n</think>", end=False))
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == num_thoughts


async def test_a_stream_of_reasoning(make_api: MakeApi, model: ServedModel) -> None:
    text = f"{THOUGHT}\n</think>\n\nSo."
    api = scripted(make_api, model, text)
    chunks = await chunks_of(api, stream_options={"include_usage": True})
    [message] = accumulated(chunks)
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, "So.")
    num_thoughts = len(say(model, f"{THOUGHT}\n</think>", end=False))
    usage = chunks[-1]["usage"]["completion_tokens_details"]
    assert usage["reasoning_tokens"] == num_thoughts


async def test_reasoning_then_calls(make_api: MakeApi, model: ServedModel) -> None:
    body = await ask(scripted(make_api, model, "Hm." + CALLS["hermes"]))
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    assert message["content"] is None
    assert len(message["tool_calls"]) == 2


async def test_reasoning_is_left_out_on_request(make_api: MakeApi, model: ServedModel) -> None:
    api = scripted(make_api, model, "Hm.</think>So.")
    body = await ask(api, include_reasoning=False)
    message = body["choices"][0]["message"]
    assert message["content"] == "So."
    assert "reasoning_content" not in message
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    [streamed] = accumulated(await chunks_of(api, include_reasoning=False))
    assert (streamed["reasoning_content"], streamed["content"]) == (None, "So.")


async def test_an_end_inside_reasoning(make_api: MakeApi, model: ServedModel) -> None:
    body = await ask(scripted(make_api, model, "Hm hm hm", end=False), max_tokens=3, tools=None)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert "Hm hm hm".startswith(choice["message"]["reasoning_content"])


async def test_stop_strings_hold_for_all_of_the_answer(
    make_api: MakeApi, model: ServedModel
) -> None:
    body = await ask(scripted(make_api, model, "Hm STOP</think>So."), stop="STOP")
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["message"]["reasoning_content"]) == ("stop", "Hm ")


async def test_earlier_reasoning_goes_back_to_the_template(
    make_api: MakeApi, model: ServedModel
) -> None:
    api = scripted(make_api, model, "</think>ok")
    turn = {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
    await ask(
        api, messages=[{"role": "user", "content": "a"}, turn, {"role": "user", "content": "b"}]
    )
    assert model.tokenizer is not None
    assert "So." in model.tokenizer.decode(api.client.prompts[0])


async def test_without_the_parser_it_is_content(make_api: MakeApi, tmp_path: Path) -> None:
    model = served(tmp_path, "hermes", reasoning_parser="none")
    body = await ask(scripted(make_api, model, "Hm.</think>So."), tools=[WEATHER])
    message = body["choices"][0]["message"]
    # The marker is a special token, and those are left out of text.
    assert message["content"] == "Hm.So."
    assert "reasoning_content" not in message
