"""Schemas that no finite JSON keeps to, against unfolding their references by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.endless_schema import endless_reference
from deploy.structured_outputs import schema_grammar
from tests.deploy.http_client import post

MakeApi = Callable[..., Any]
USER = [{"role": "user", "content": "Hi"}]
ROOT = {"$ref": "#"}
X = {"$ref": "#/$defs/x"}


def holding(inner: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": inner}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "ref"),
    [
        (ROOT, "#"),
        ({"allOf": [ROOT]}, "#"),
        ({"anyOf": [ROOT]}, "#"),
        (holding(ROOT), "#"),
        ({"type": "array", "items": ROOT, "minItems": 1}, "#"),
        ({"type": "array", "prefixItems": [ROOT], "minItems": 1}, "#"),
        ({**X, "$defs": {"x": {"$ref": "#/$defs/y"}, "y": X}}, "#/$defs/x"),
        ({"properties": {"a": X}, "$defs": {"x": X}}, "#/$defs/x"),
    ],
)
async def test_they_are_refused_in_clear_words(
    make_api: MakeApi, schema: dict[str, Any], ref: str
) -> None:
    named = {"name": "n", "schema": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    bodies = {
        "structured_outputs.json": {"structured_outputs": {"json": schema}},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": named}},
        "tools": {"tools": [tool], "tool_choice": "required"},
    }
    if schema.get("type") == "array":  # which no function's parameters are
        del bodies["tools"]
    for param, body in bodies.items():
        response = await post(make_api(), "/v1/chat/completions", {"messages": USER, **body})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        says = f'its $ref "{ref}" leads back to itself without end: no JSON keeps to it'
        assert error["message"] == f"{param}: {says}"


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [ROOT, {"type": "string"}]},
        {"type": "object", "properties": {"a": ROOT}},
        {"type": "array", "items": ROOT},
        holding({"anyOf": [ROOT, {"type": "null"}]}),
        {"type": "object", "properties": {"$ref": {"type": "string"}}, "required": ["$ref"]},
        {"$defs": {"a/b": {"type": "null"}}, "$ref": "#/$defs/a~1b"},
    ],
)
def test_those_that_end_are_kept(schema: dict[str, Any]) -> None:
    assert endless_reference(schema) is None
    assert schema_grammar(schema)


NAMES = ("p", "q", "r")
leaves = st.sampled_from([{"type": "null"}, True, {"const": 1}])
references = st.sampled_from(NAMES).map(lambda name: {"$ref": f"#/$defs/{name}"})
schemas: Any = st.recursive(
    leaves | references,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2).map(lambda each: {"allOf": each})
        | st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each})
        | inner.map(holding)
        | inner.map(lambda each: {"type": "object", "properties": {"a": each}})
        | inner.map(lambda each: {"type": "array", "items": each, "minItems": 1})
        | inner.map(lambda each: {"type": "array", "items": each})
    ),
    max_leaves=4,
)


def ends(schema: Any, defs: dict[str, Any], depth: int) -> bool:
    """Whether something keeps to it that follows no more than `depth` references in a row."""
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        return depth > 0 and ends(defs[name], defs, depth - 1)
    if "allOf" in schema:
        return all(ends(each, defs, depth) for each in schema["allOf"])
    if "anyOf" in schema:
        return any(ends(each, defs, depth) for each in schema["anyOf"])
    if "required" in schema:
        return ends(schema["properties"]["a"], defs, depth)
    return "minItems" not in schema or ends(schema["items"], defs, depth)


@given(st.fixed_dictionaries(dict.fromkeys(NAMES, schemas)), schemas)
def test_against_unfolding(defs: dict[str, Any], schema: Any) -> None:
    whole = {"allOf": [schema], "$defs": defs}
    used = {name for name in NAMES if f"#/$defs/{name}'" in str(whole)}
    # Whoever ends at all ends without coming by the same reference twice.
    endless = {name for name in used if not ends(defs[name], defs, len(NAMES))}
    found = endless_reference(whole)
    assert (found is None) == (not endless)
    assert found is None or found.removeprefix("#/$defs/") in endless
