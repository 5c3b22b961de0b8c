"""The openai package's own types and helpers over tool calls and reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.deploy.conftest import say
from tests.deploy.test_openai_client import client, served
from tests.deploy.test_tools_api import ARGUMENTS, CALLS, NOW, WEATHER, model_of

MakeApi = Callable[..., Any]
USER: Any = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("form", CALLS)
async def test_the_helpers_read_calls(make_api: MakeApi, form: str, tmp_path: Path) -> None:
    model = model_of(form, tmp_path)
    api = make_api(ids=say(model, CALLS[form]), model=model)
    asked: Any = {"model": model.name, "messages": USER, "tools": [WEATHER, NOW]}
    async with served(api) as base:
        openai = client(base)
        reply = await openai.chat.completions.create(**asked)
        async with openai.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                continue
            streamed = await stream.get_final_completion()
    for completion in (reply, streamed):
        [choice] = completion.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        calls = choice.message.tool_calls
        assert calls is not None
        functions = [call.function for call in calls if call.type == "function"]
        assert [function.name for function in functions] == ["get_weather", "now"]
        assert functions[0].arguments == ARGUMENTS
        assert json.loads(functions[1].arguments) == {}
    assert reply.to_dict().keys() == streamed.to_dict().keys() | {"usage"}


async def test_every_object_is_of_the_packages_types(make_api: MakeApi, tmp_path: Path) -> None:
    model = model_of("hermes", tmp_path)
    api = make_api(ids=say(model, "Hm." + CALLS["hermes"]), model=model)
    asked: Any = {"model": model.name, "messages": USER, "tools": [WEATHER, NOW], "n": 2}
    async with served(api) as base:
        openai = client(base)
        raw = await openai.chat.completions.with_raw_response.create(**asked)
        body = ChatCompletion.model_validate_json(raw.text, strict=True)
        usage = body.usage
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert (usage.completion_tokens_details.reasoning_tokens or 0) > 0
        assert body.choices[0].message.to_dict()["reasoning_content"] == "Hm."
        stream = await openai.chat.completions.create(**asked, stream=True)
        async for chunk in stream:
            ChatCompletionChunk.model_validate(chunk.to_dict(), strict=True)
