"""Grammars of answers that have to call a tool, in llguidance's Lark dialect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.reasoning import END_THINK, THINK
from deploy.tool_formats import HERMES, JAMBA, JSON, ToolFormat

# As `json.dumps` writes, which is what models have seen; free white space would have no end.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Around one call or a list of them, as the published chat templates show them to the model.
_LAYOUTS = {
    JAMBA.name: ("[\n    ", ",\n    ", "\n]"),
    HERMES.name: ("\n", "\n", "\n"),
    JSON.name: ('{"tool_calls": [', ", ", "]}"),
}
SpecialIds = Mapping[str, int]
"""Of the markers that are special tokens: no text in a grammar matches those."""


def calls_grammar(
    form: ToolFormat,
    functions: Sequence[Mapping[str, Any]],
    *,
    one_call: bool,
    special_ids: SpecialIds,
    reasoning: str = "",
) -> str:
    """Nothing but calls of `functions`, whose arguments keep to their schemas.

    `reasoning` is `reasoning_rule`'s, of what may come first.
    """
    before, between, behind = map(_text, _LAYOUTS[form.name])
    opening, closing = (_marker(text, special_ids) for text in form.markers or ("", ""))
    if form is HERMES:  # every call has its own markers
        many = f"{opening} {before} call {behind} {closing}"
        start = [many] if one_call else [many, f"({between} {many})*"]
    else:
        # Jamba's prompt ends in front of the space that every turn begins with.
        space = '" "?' if form is JAMBA else ""
        more = "" if one_call else f"({between} call)*"
        start = [space, opening, before, "call", more, behind, closing]
    rules = [
        " ".join(["start:", reasoning, *start]),
        "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
    ]
    for i, function in enumerate(functions):
        head = _text(f'{{"name": "{function["name"]}", "arguments": ')
        rules.append(f'call_{i}: {head} {_arguments(function.get("parameters"))} "}}"')
    if "thought" in reasoning:
        rules.append(f"thought[lazy]: /(.|\\n)*{END_THINK}/".replace("</", "<\\/"))
    return "\n".join(rules)


def reasoning_rule(*, opened: bool, special_ids: SpecialIds) -> str:
    """Reasoning in front of an answer: to its end where the prompt has opened it, else optional."""
    thought = "thought"
    if END_THINK in special_ids:
        thought = f"/(.|\\n)*/ {_marker(END_THINK, special_ids)}"
    thought += r" /\n{0,2}/"
    return thought if opened else f"({_marker(THINK, special_ids)} {thought})?"


def _marker(text: str, special_ids: SpecialIds) -> str:
    if text in special_ids:
        return f"<[{special_ids[text]}]>"
    return _text(text) if text else ""


def _text(text: str) -> str:
    return json.dumps(text)


def _arguments(parameters: Mapping[str, Any] | None) -> str:
    if parameters is None:
        return _text("{}")
    schema = {"type": "object", **parameters, "x-guidance": _LAYOUT}
    return f"%json {json.dumps(schema, allow_nan=False)}"
