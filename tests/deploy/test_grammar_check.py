"""Grammars that would end a process, or never end, are refused; others are not disturbed."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.grammar_check import GrammarCheck, TooComplex
from deploy.openai_errors import ApiError
from deploy.structured_outputs import choice_grammar, lark_grammar, schema_grammar

DEEP = {
    "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(2500)}
    | {"d2500": {}},
    "$ref": "#/$defs/d0",
}
ENDLESS = {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(20)]}
WIDE = {"properties": {str(i): {} for i in range(5000)}, "additionalProperties": False}
UNFORCED = '\n%llguidance {"no_forcing": true}\n'
CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "x"'


@pytest.mark.parametrize("schema", [DEEP, ENDLESS, WIDE, {"$ref": "#"}])
def test_a_schema_is_refused_and_the_next_one_answered(schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        schema_grammar(schema)
    assert (caught.value.status, caught.value.param) == (400, "structured_outputs.json")
    assert schema_grammar({"type": "integer"})


def test_a_chain_of_rules_is_refused() -> None:
    with pytest.raises(ApiError, match="too deep or too large"):
        lark_grammar(CHAIN)


def test_what_is_honest_passes() -> None:
    assert choice_grammar([f"choice {i}" for i in range(1000)])
    properties = {f"field_{i}": {"type": "integer"} for i in range(200)}
    assert schema_grammar({"type": "object", "properties": properties})
    required = {f"field_{i}": {"type": "string"} for i in range(600)}
    assert schema_grammar({"properties": required, "required": list(required)})


def test_time_is_bounded_and_the_child_is_replaced() -> None:
    check = GrammarCheck(seconds=0.3)
    try:
        endless = 'start: %json {"allOf": [' + ", ".join(
            f'{{"type": "string", "pattern": ".*a.{{{i}}}b.*"}}' for i in range(20)
        )
        with pytest.raises(TooComplex, match=r"longer than 0\.3 s"):
            check.messages(endless + "]}")
        assert check.messages('start: "a"' + UNFORCED) == []
        assert check.messages("start: (")
        first = check._child
        assert check.messages('start: "b"' + UNFORCED) == []
        assert check._child is first is not None
        first.kill()
        first.wait()
        assert check.messages('start: "c"' + UNFORCED) == []
    finally:
        check.close()
