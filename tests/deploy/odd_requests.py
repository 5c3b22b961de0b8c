"""A chat request with texts in every kind of place, and what spoils one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FUNCTION = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"enum": ["e"]}}},
}
CALL = {"id": "i", "type": "function", "function": {"name": "f", "arguments": {"a": ["x"]}}}
FULL: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Hi", "name": "n"},
        {"role": "assistant", "content": [{"type": "text", "text": "t"}], "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "i", "content": "c"},
    ],
    "model": "nano-jamba",
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "auto",
    "stop": ["s"],
    "bad_words": ["w"],
    "user": "u",
    "metadata": {"k": "v"},
    "documents": [{"title": "t"}],
    "chat_template_kwargs": {"x": ["y"]},
    "logit_bias": {"5": 1},
    "cache_salt": "c",
    "structured_outputs": {"choice": ["c"]},
    "response_format": {"type": "text"},
    "nobody": {"knows": ["this"]},
}


def spoiled(value: Any, odd: str) -> Iterator[Any]:
    """Copies of `value`, each with `odd` in the place of one text or name, at any depth."""
    if isinstance(value, str):
        yield odd
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in spoiled(each, odd))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield {odd if k == key else k: v for k, v in value.items()}
            yield from ({**value, key: other} for other in spoiled(each, odd))
