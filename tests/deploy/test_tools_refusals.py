"""Requests with tools that cannot be served name the field; what has no effect is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.http_client import post
from tests.deploy.test_tools_api import CONVERSATION, NOW, USER, WEATHER, ask, model_of, scripted
from tests.deploy.tool_checkpoints import served

MakeApi = Callable[..., Any]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools", ""),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools", "name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools", "name"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "string"}},
                    }
                ]
            },
            "tools",
            "object",
        ),
        ({"tools": [WEATHER] * 129}, "tools", "128"),
        ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", ""),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "get_weather, now",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "tools"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", ""),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"function_call": {"name": "f"}}, "function_call", "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x", "tool_calls": CONVERSATION[1]["tool_calls"]}
                ]
            },
            "messages",
            "assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x", "function": {}}]}]},
            "messages",
            "name",
        ),
    ],
)
async def test_bad_requests_name_the_field(
    make_api: MakeApi, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"messages": USER, "tools": [WEATHER, NOW], **fields}
    response = await post(make_api(), "/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].split(".")[0].split("[")[0] == param
    assert words in error["message"]


async def test_strict_in_vain_is_said(make_api: MakeApi, tmp_path: Path) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    model = model_of("json", tmp_path)
    body = await ask(scripted(make_api, model, "ok"), tools=[NOW, strict])
    assert [text.split(" ")[0] for text in body["warnings"]] == ["tools.1.function.strict"]
    body = await ask(scripted(make_api, model, "ok"), tools=[strict], tool_choice="required")
    assert "warnings" not in body


async def test_no_parser_is_a_refusal(make_api: MakeApi, tmp_path: Path) -> None:
    model = served(tmp_path, "jamba", tool_call_parser="none")
    api = scripted(make_api, model, "ok")
    body = {"messages": USER, "tools": [WEATHER]}
    response = await post(api, "/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
