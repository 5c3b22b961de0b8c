"""What may be asked of an answer's form, and what is refused, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deploy.openai_errors import ApiError
from deploy.structured_outputs import (
    MAX_CHOICES,
    any_grammar,
    choice_grammar,
    lark_grammar,
    regex_grammar,
    schema_grammar,
)
from tests.deploy.conftest import load_nano
from tests.deploy.http_client import is_openai_error, post

USER = [{"role": "user", "content": "Hi"}]
MakeApi = Callable[..., Any]


@pytest.mark.parametrize(
    ("make", "argument", "reason"),
    [
        (schema_grammar, {"type": "zzz"}, "Invalid type: zzz"),
        (schema_grammar, {"type": "array", "uniqueItems": True}, "uniqueItems"),
        (schema_grammar, {"uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        (schema_grammar, {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        (schema_grammar, {"$ref": "http://example.com/x"}, "retriev"),
        (schema_grammar, {"const": float("nan")}, "not a JSON schema"),
        (schema_grammar, {"const": object()}, "not a JSON schema"),
        (schema_grammar, {"const": "\ud800"}, "hex escape"),
        (schema_grammar, {"x-guidance": 3}, "JsonCompileOptions"),
        (schema_grammar, False, "Unsatisfiable"),
        (choice_grammar, [], "allowed are 1.."),
        (choice_grammar, ["a"] * (MAX_CHOICES + 1), "allowed are 1.."),
        (choice_grammar, ["\ud800"], "hex escape"),
        (regex_grammar, "a(", "unclosed group"),
        (regex_grammar, "(a)\\1", "backreferences"),
        (regex_grammar, "\ud800", "not valid Unicode"),
        (regex_grammar, "(" * 20_000, "regex"),
        (lark_grammar, "start: nothing", "unknown name"),
        (lark_grammar, "x" * 600_000, "600000 characters"),
        (lark_grammar, "start: " + "(" * 20_000, "deeply nested"),
        (any_grammar, "root := x", "Expected"),
        (any_grammar, "\ud800", "not valid Unicode"),
        (any_grammar, "", "No 'root' rule"),
    ],
)
def test_what_is_no_grammar(make: Callable[..., str], argument: Any, reason: str) -> None:
    with pytest.raises(ApiError, match=re.escape(reason)) as refused:
        make(argument, param="the_field")
    error = refused.value
    assert (error.status, error.param, error.code) == (400, "the_field", "invalid_grammar")
    assert error.message.startswith("the_field: ")
    assert len(error.message) < 400


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(ApiError):
        schema_grammar(schema)


def test_what_is_a_grammar() -> None:
    assert schema_grammar({"type": "object"}) != schema_grammar(True)
    for make, argument in (
        (choice_grammar, ["", 'a"b', "\u2028 😀\x7f\x00"]),
        (regex_grammar, "a/b|[^\\n]*"),
        (lark_grammar, 'start: "a" # the end'),
        (lark_grammar, "start: <|tool|> %json {}"),
        (any_grammar, 'root ::= "a" | [0-9]+'),
        (any_grammar, 'start: "a"+'),
    ):
        assert make(argument).endswith('%llguidance {"no_forcing": true}\n')


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "required"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "schema"),
        ({"response_format": {**FORMAT, "json_schema": {"name": "n"}}}, "response_format",
         "schema"),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos", "not allowed"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs",
         "together with response_format"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "not none"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs",
         "not regex and choice"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"json": "3"}}, "structured_outputs.json", "object, true or false"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"json": {}, "disable_additional_properties": True}},
         "structured_outputs", "disable_additional_properties"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs", "regx"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs",
         "only allowed with json"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "("}},
         "structured_outputs.json", "unclosed"),
        ({"guided_json": {}}, "guided_json", 'structured_outputs {"json"'),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs"),
        ({"guided_grammar": "a"}, "guided_grammar", "structured_outputs"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "structured_outputs"),
        ({"return_routed_experts": True}, "return_routed_experts", "allowed values: false"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(
    make_api: MakeApi, body: dict[str, Any], param: str, says: str
) -> None:
    api = make_api()
    for path, prompt in (
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": [5]}),
    ):
        response = await post(api, path, {**prompt, **body})
        assert response.status_code == 400, response.text
        assert is_openai_error(response.json())
        error = response.json()["error"]
        assert error["param"] == param
        assert says in error["message"]
    assert not api.client.streams


async def test_no_grammar_unless_asked_for(make_api: MakeApi) -> None:
    api = make_api()
    for body in ({}, {"response_format": {"type": "text"}}, {"structured_outputs": None}):
        assert (await post(api, "/v1/completions", {"prompt": [5], **body})).status_code == 200
    assert api.client.grammars == [None, None, None]


async def test_every_choice_gets_the_grammar(make_api: MakeApi) -> None:
    api = make_api(max_num_seqs=8)
    body = {"prompt": [[5], [6]], "n": 2, "response_format": FORMAT}
    assert (await post(api, "/v1/completions", body)).status_code == 200
    assert len(api.client.grammars) == 4
    assert set(api.client.grammars) == {schema_grammar(SCHEMA)}


@pytest.mark.parametrize(
    "body", [{"response_format": FORMAT}, {"structured_outputs": {"choice": ["a"]}}]
)
async def test_without_a_tokenizer(make_api: MakeApi, body: dict[str, Any]) -> None:
    api = make_api(model=replace(load_nano("nano-jamba"), tokenizer=None))
    response = await post(api, "/v1/completions", {"prompt": [5], **body})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "tokenizer_missing"
    assert response.json()["error"]["param"] == next(iter(body))
