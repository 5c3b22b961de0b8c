"""Answers that have to call a tool: real models, held to the form by grammars."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.demo import nano_checkpoint
from deploy.served_model import ServedModel
from deploy.vocabulary import vocabulary_of
from shards.grammar import Grammars
from tests.deploy.conftest import running_service, say
from tests.deploy.http_client import post
from tests.deploy.test_tools_api import USER, ask, model_of, scripted
from tests.deploy.tool_checkpoints import checkpoint

MakeApi = Callable[..., Any]
SCHEMA = {
    "type": "object",
    "properties": {
        "class": {"enum": ["first", "second"]},
        "seats": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["class", "seats"],
    "additionalProperties": False,
}
FUNCTION = {"name": "book", "parameters": SCHEMA}
BOOK = {"type": "function", "function": FUNCTION}
PING = {"type": "function", "function": {"name": "ping"}}
NAMED = {"type": "function", "function": {"name": "book"}}


# Few words: the nano models' context is short.
FEW = {"properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
SEATING = {"type": "function", "function": {"name": "book", "parameters": FEW}}


@pytest.mark.parametrize("form", ["json", "jamba", "hermes"])
async def test_a_real_model_calls_what_it_has_to(form: str, tmp_path: Path) -> None:
    json_form = form == "json"
    folder = nano_checkpoint("nano-phimoe") if json_form else checkpoint(tmp_path, form)
    with running_service(folder, max_model_len=512) as service:
        for seed, choice in enumerate([NAMED, "required", "required"]):
            body = {
                "messages": USER,
                "tools": [PING, SEATING],
                "tool_choice": choice,
                "temperature": 1.5,
                "seed": seed,
                "max_tokens": 90,
                "parallel_tool_calls": False,
                # Random text ends reasoning by chance only.
                "logit_bias": {"507": 30} if form == "hermes" else None,
            }
            answer = await service.chat(body)
            assert isinstance(answer, dict)
            [reply] = answer["choices"]
            assert reply["finish_reason"] == "tool_calls", reply
            [call] = reply["message"]["tool_calls"]
            if call["function"]["name"] == "ping":
                assert call["function"]["arguments"] == "{}"
                assert choice != NAMED
            else:
                assert call["function"]["name"] == "book"
                assert json.loads(call["function"]["arguments"]) in ({"n": 1}, {"n": 2})


def accepts(model: ServedModel, grammar: str, *pieces: str) -> bool:
    """Whether a text, its pieces tokenized apart, is an answer, by the masks that sampling sees."""
    constraint = Grammars(vocabulary_of(model)).begin(grammar, [])
    for token_id in (token_id for piece in pieces for token_id in say(model, piece, end=False)):
        if not constraint.mask(model.vocab_size)[token_id]:
            return False
        constraint._matcher.consume_token(token_id)  # type: ignore[union-attr]
    return bool(constraint._matcher.is_accepting())  # type: ignore[union-attr]


def call(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


SEATS = '{"class": "first", "seats": 3}'
FORMS = {
    "jamba": (" <tool_calls>[\n    ", ",\n    ", "\n]</tool_calls>"),
    "hermes": ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    "json": ('{"tool_calls": [', ", ", "]}"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_what_the_grammar_lets_through(make_api: MakeApi, form: str, tmp_path: Path) -> None:
    before, between, behind = FORMS[form]
    model = model_of(form, tmp_path)
    api = scripted(make_api, model, "</think>ok")
    fields: dict[str, Any] = {"tools": [PING, BOOK]}
    await ask(api, **fields, tool_choice="required")
    await ask(api, **fields, tool_choice="required", parallel_tool_calls=False)
    await ask(api, **fields, tool_choice=NAMED)
    await ask(api, **fields)
    many, one, named, free = api.client.grammars
    assert free is None
    thought = "Hm.</think>\n\n" if form == "hermes" else ""
    ping, book = call("ping", "{}"), call("book", SEATS)
    both = f"{thought}{before}{ping}{between}{book}{behind}"
    alone = f"{thought}{before}{ping}{behind}"
    booked = f"{thought}{before}{book}{behind}"
    assert [accepts(model, many, text) for text in (both, alone, booked)] == [True] * 3
    assert [accepts(model, one, text) for text in (both, alone, booked)] == [False, True, True]
    assert [accepts(model, named, text) for text in (both, alone, booked)] == [False, False, True]
    wrong = booked.replace("3", "30")
    assert not accepts(model, many, wrong)
    assert not accepts(model, many, f"{thought}Hello")
    # A call in the reasoning that the prompt has opened would not be one.
    assert accepts(model, many, alone.removeprefix(thought)) is not bool(thought)


async def test_strict_functions_are_held_to_where_a_token_begins_calls(
    make_api: MakeApi, tmp_path: Path
) -> None:
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    model = model_of("jamba", tmp_path)
    api = scripted(make_api, model, "ok")
    body = await ask(api, tools=[strict])
    assert "warnings" not in body
    [grammar] = api.client.grammars
    before, _, behind = FORMS["jamba"]
    assert accepts(model, grammar, "Hello {")
    assert accepts(model, grammar, f"Well.{before}{call('book', SEATS)}{behind}")
    assert not accepts(model, grammar, f"Well.{before}{call('book', '{}')}{behind}")


@pytest.mark.parametrize("form", ["jamba", "hermes"])
async def test_strict_functions_cannot_be_called_by_a_spelt_marker(
    make_api: MakeApi, form: str, tmp_path: Path
) -> None:
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    model = model_of(form, tmp_path)
    api = scripted(make_api, model, "</think>ok")
    await ask(api, tools=[strict])
    [grammar] = api.client.grammars
    thought = "Hm.</think>" if form == "hermes" else ""
    before, _, _ = FORMS[form]
    wrong = f"{before}{call('book', '{}')}"
    marker = before.strip().partition(">")[0] + ">"
    for cut in range(1, len(marker)):
        spelt = (wrong[: wrong.index(marker) + cut], wrong[wrong.index(marker) + cut :])
        # Whoever reads the text takes it for a call, but no token of it is the marker.
        ids = [token_id for piece in spelt for token_id in say(model, piece, end=False)]
        assert model.tokenizer is not None
        assert model.tokenizer.token_id(marker) not in ids
        assert not accepts(model, grammar, f"{thought}Well.", *spelt)
    assert accepts(model, grammar, f"{thought}Well. {marker[:-1]}", "s or not? <")


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@pytest.mark.parametrize("form", ["jamba", "hermes"])
async def test_a_form_of_the_answer_beside_tools(
    make_api: MakeApi, form: str, tmp_path: Path
) -> None:
    model = model_of(form, tmp_path)
    api = scripted(make_api, model, "</think>ok")
    await ask(api, tools=[PING], response_format=FORM)
    await ask(api, tools=None, response_format=FORM)
    with_tools, without = api.client.grammars
    thought = "Hm.</think>\n\n" if form == "hermes" else ""
    before, _, behind = FORMS[form]
    answer, calls = f"{thought}{SEATS}", f"{thought}{before}{call('ping', '{}')}{behind}"
    assert [accepts(model, with_tools, text) for text in (answer, calls)] == [True, True]
    assert [accepts(model, without, text) for text in (answer, calls)] == [True, False]
    assert not accepts(model, with_tools, f"{thought}{{}}")
    body = await ask(api, tools=[PING], response_format=FORM, tool_choice="required")
    assert body["warnings"] == ["response_format has no effect where a tool has to be called"]
    forced = api.client.grammars[-1]
    assert [accepts(model, forced, text) for text in (answer, calls)] == [False, True]


async def test_json_calls_and_a_form_are_refused(make_api: MakeApi, tmp_path: Path) -> None:
    api = scripted(make_api, model_of("json", tmp_path), "ok")
    body = {"messages": USER, "tools": [PING], "response_format": {"type": "json_object"}}
    response = await post(api, "/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    "parameters", [{"type": "object", "properties": 3}, {"properties": {"a": {"type": "nothing"}}}]
)
async def test_schemas_that_cannot_be_kept_are_refused(
    make_api: MakeApi, parameters: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": USER, "tools": [tool], "tool_choice": "required"}
    response = await post(make_api(), "/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
