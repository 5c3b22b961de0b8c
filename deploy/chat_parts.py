"""Content, reasoning and tool calls in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.answer_reader import Reading
from deploy.generation import Delta
from deploy.openai_errors import Json
from deploy.tool_calls import CallDelta


def message(reading: Reading, deltas: Sequence[Delta]) -> Json:
    """The assistant's turn; its content is null where calls or reasoning are all there is."""
    content = "".join(delta.text for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    calls = _whole_calls(deltas)
    empty = None if calls or any(delta.thinking for delta in deltas) else ""
    body: Json = {"role": "assistant", "content": content or empty, "refusal": None}
    if reading.reasoning and reading.show_reasoning:
        body["reasoning_content"] = reasoning or None
    if calls:
        body["tool_calls"] = calls
    return body


def chunk_delta(reading: Reading, delta: Delta) -> Json:
    """The same of a streamed chunk."""
    body: Json = {}
    if delta.reasoning:
        body["reasoning_content"] = delta.reasoning
    if delta.calls:
        body["tool_calls"] = [_call_chunk(call) for call in delta.calls]
    if delta.text or not (body or delta.finish or reading.tool_format or reading.reasoning):
        body["content"] = delta.text
    return body


def _whole_calls(deltas: Sequence[Delta]) -> list[Json]:
    calls: list[Json] = []
    for part in (call for delta in deltas for call in delta.calls):
        if part.name is not None:
            function = {"name": part.name, "arguments": ""}
            calls.append({"id": part.call_id, "type": "function", "function": function})
        calls[part.index]["function"]["arguments"] += part.arguments
    return calls


def _call_chunk(call: CallDelta) -> Json:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.call_id, "type": "function", "function": function}
