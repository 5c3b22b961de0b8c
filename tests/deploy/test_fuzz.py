"""No body, however odd, is answered with a 500, and every refusal is in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest
from deploy.unsupported import REFUSED_FIELDS

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
KINDS = (ChatRequest, CompletionRequest, ClassifyRequest)
FIELDS = sorted({name for kind in KINDS for name in kind.model_fields} | REFUSED_FIELDS.keys())
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 300)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "\ud800", "a"])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "x", "function", "name"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
good: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": [5, 6],
    "input": [5, 6],
}
functions = st.dictionaries(
    st.sampled_from(["name", "parameters", "description", "strict", "x"]),
    st.just("f") | st.just({"type": "object"}) | values,
)
tools = st.fixed_dictionaries({"type": st.just("function"), "function": functions})
calls = st.fixed_dictionaries(
    {"id": st.just("c"), "function": st.fixed_dictionaries({"name": leaves, "arguments": values})}
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "tool"])},
    optional={"content": values, "tool_calls": st.lists(calls), "tool_call_id": leaves},
)
tool_bodies = st.fixed_dictionaries(
    {"messages": st.lists(turns, min_size=1, max_size=3)},
    optional={
        "tools": st.lists(tools, max_size=2),
        "tool_choice": st.sampled_from(["auto", "required", "none"]) | values,
        "parallel_tool_calls": st.booleans() | values,
        "response_format": st.just({"type": "json_object"}) | values,
    },
)
bodies = st.builds(
    lambda keep, odd: {**(good if keep else {}), **odd},
    st.booleans(),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), values, max_size=4),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    bodies | tool_bodies,
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/classify"]),
)
async def test_any_json(make_api: Any, body: dict[str, Any], path: str) -> None:
    api = make_api(ids=[70] * 300)
    transport = httpx.ASGITransport(api.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert all(stream.aborted for stream in api.client.streams)
