"""Grammars of tool calls, in llguidance's Lark dialect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.reasoning import END_THINK, THINK
from deploy.structured_outputs import lark_json
from deploy.tool_formats import HERMES, JAMBA, JSON, ToolFormat

# As `json.dumps` writes, which is what models have seen.
_JSON_LAYOUT = {
    "whitespace_pattern": None,
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
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
) -> str:
    """Nothing but calls of `functions`, whose arguments keep to their schemas.

    Raises ApiError for a schema that is not JSON.
    """
    before, between, behind = map(_text, _LAYOUTS[form.name])
    opening, closing = (_marker(text, special_ids) for text in form.markers or ("", ""))
    if form is HERMES:  # every call has its own markers
        call = f"{opening} {before} call {behind} {closing}"
        start = [call] if one_call else [call, f"({between} {call})*"]
    else:
        # Jamba's prompt ends in front of the space that every turn begins with.
        space = '" "?' if form is JAMBA else ""
        more = "" if one_call else f"({between} call)*"
        start = [space, opening, before, "call", more, behind, closing]
    rules = [
        " ".join(["start:", *start]),
        "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
    ]
    for i, function in enumerate(functions):
        head = _text(f'{{"name": "{function["name"]}", "arguments": ')
        rules.append(f'call_{i}: {head} {_arguments(function.get("parameters"))} "}}"')
    return "\n".join(rules)


def reasoning_rules(*, opened: bool, special_ids: SpecialIds) -> str:
    """The rule `reasoning` of what may come before an answer, or must where it was `opened`."""
    if END_THINK in special_ids:
        thought = f"thought: /(.|\\n)*/ {_marker(END_THINK, special_ids)}"
    else:
        thought = f"thought[lazy]: /(.|\\n)*<\\/{END_THINK[2:]}/"
    begins = "" if opened else _marker(THINK, special_ids)
    once = f"{begins} thought /\\n{{0,2}}/"
    return f"reasoning: {once if opened else f'({once})?'}\n{thought}"


def _marker(text: str, special_ids: SpecialIds) -> str:
    if text in special_ids:
        return f"<[{special_ids[text]}]>"
    return _text(text) if text else ""


def _text(text: str) -> str:
    return json.dumps(text)


def _arguments(parameters: Mapping[str, Any] | None) -> str:
    if parameters is None:
        return _text("{}")
    schema = {"type": "object", **parameters}
    return lark_json(schema, param="tools", options=_JSON_LAYOUT)
