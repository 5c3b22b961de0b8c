"""Tools for chat templates that know none: described in the system prompt, calls as JSON.

The form is `tool_formats.JSON`'s; earlier calls and their results are shown in it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_FORM = '{"tool_calls": [{"name": "<name>", "arguments": {<arguments>}}]}'


def describe_tools(functions: Sequence[Mapping[str, Any]], *, must_call: str = "") -> str:
    """The system prompt's words on `functions`; `must_call` says what has to be called now."""
    lines = [
        "You can call these functions. Their parameters are described by JSON schemas:",
        *(json.dumps(function, ensure_ascii=False) for function in functions),
        "To call some of them, answer with JSON of this form alone:",
        _FORM,
        "Where none is needed, answer in plain words.",
    ]
    return "\n".join([*lines, must_call] if must_call else lines)


def with_tools(messages: Sequence[Message], description: str) -> list[Message]:
    """`messages` without tool calls and roles that the template does not know."""
    turns: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls") or ()
        names |= {call["id"]: call["function"]["name"] for call in calls}
        if message["role"] == "tool":
            result = _result(message, names)
            if turns and turns[-1].get("role") == "tool":
                turns[-1]["content"] += "\n" + result
            else:
                turns.append({"role": "tool", "content": result})
        else:
            turns.append(_spelled(message, calls) if calls else message)
    for turn in turns:
        # The results of one answer's calls are one turn of the user.
        if turn["role"] == "tool":
            turn["role"] = "user"
    return _in_system(turns, description) if description else turns


def _spelled(message: Message, calls: Sequence[Mapping[str, Any]]) -> Message:
    written = [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in calls
    ]
    text = json.dumps({"tool_calls": written}, ensure_ascii=False)
    said = message.get("content")
    turn = {key: value for key, value in message.items() if key != "tool_calls"}
    return turn | {"content": f"{said}\n{text}" if said else text}


def _result(message: Message, names: Mapping[str, str]) -> str:
    name = names.get(message.get("tool_call_id") or "", message.get("name"))
    of = f" of {name}" if name else ""
    return f"Result{of}: {message.get('content') or ''}"


def _in_system(turns: list[Message], description: str) -> list[Message]:
    if turns and turns[0]["role"] in ("system", "developer"):
        said = turns[0].get("content")
        content = f"{said}\n\n{description}" if said else description
        return [turns[0] | {"content": content}, *turns[1:]]
    return [{"role": "system", "content": description}, *turns]
