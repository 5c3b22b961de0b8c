"""Answers of real models keep to their form: validated by others than those who constrain them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.demo import nano_checkpoint
from deploy.openai_errors import ApiError
from deploy.service import ApiService
from tests.deploy.conftest import running_service
from tests.deploy.json_schemas import schemas

USER = [{"role": "user", "content": "Tell me"}]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def service() -> Iterator[ApiService]:
    with running_service(nano_checkpoint("nano-jamba")) as service:
        yield service


async def chat(service: ApiService, **body: Any) -> list[tuple[str, str]]:
    """Text and finish reason of every choice, streamed or not."""
    answer: Any = await service.chat({"messages": USER, "max_tokens": 400, **body})
    if isinstance(answer, dict):
        return [(c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]
    return await gather_chunks(answer)


async def gather_chunks(chunks: AsyncGenerator[Json, None]) -> list[tuple[str, str]]:
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    async for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                finishes[index] = choice["finish_reason"]
    return [(texts[i], finishes[i]) for i in sorted(texts)]


def ways(seed: int) -> list[Json]:
    return [
        {"temperature": 0, "seed": seed},
        {"temperature": 1, "seed": seed, "n": 2},
        {"temperature": 1, "seed": seed, "n": 2, "stream": True},
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(schemas(), min_size=4, max_size=4), st.integers(0, 2**32))
def test_random_schemas(service: ApiService, wanted: list[Json], seed: int) -> None:
    async def ask_all() -> list[list[tuple[str, str]]]:
        calls = []
        for schema in wanted:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            calls += [chat(service, response_format=form, **way) for way in ways(seed)]
        return list(await asyncio.gather(*calls))

    answers = asyncio.run(ask_all())
    for i, answer in enumerate(answers):
        for text, finish in answer:
            assert finish == "stop", text
            jsonschema.validate(json.loads(text), wanted[i // 3])
        if i % 3 == 2:
            assert answer == answers[i - 1], "streamed as whole"


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-c]{3}-[0-9]{1,4}",
        "(yes|no|né)( and (yes|no)){0,2}",
        "a/b\\.[^\\n]{4}",
        "\\d{2,3}|\\w{1,5}",
        "(?i)abc",
        "😀{2}",
        "x?",
    ],
)
async def test_regular_expressions(service: ApiService, pattern: str) -> None:
    for way in ways(3):
        for text, finish in await chat(service, structured_outputs={"regex": pattern}, **way):
            assert finish == "stop"
            assert re.fullmatch(pattern, text), text


async def test_choices(service: ApiService) -> None:
    choices = ["yes", "no", "no more", 'a "quoted"\n line', "ünï😀", "y"]
    found = set()
    for seed in range(6):
        for way in ways(seed):
            for text, finish in await chat(service, structured_outputs={"choice": choices}, **way):
                assert finish == "stop"
                assert text in choices
                found.add(text)
    assert len(found) > 2


async def test_grammars(service: ApiService) -> None:
    nested = 'start: "(" start ")" | "x" NUM\nNUM: /[0-9]{2}/'
    for grammar in (nested, 'root ::= "(" root ")" | "x" [0-9] [0-9]'):
        asked = {"structured_outputs": {"grammar": grammar}}
        for way in ways(5):
            for text, finish in await chat(service, **asked, **way):
                opened = text.count("(")
                shape = "\\(" * opened + "x[0-9]{2}" + "\\)" * (opened if finish == "stop" else 0)
                assert finish == "length" or re.fullmatch(shape, text), text


async def test_any_object_and_its_white_space(service: ApiService) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4}
    tight = {"json": json.dumps(schema), "disable_any_whitespace": True}
    dotted = {"json": schema, "whitespace_pattern": "[.]"}
    for way in ways(7):
        for text, _ in await chat(service, structured_outputs=tight, **way):
            assert re.fullmatch("\\[[12](,[12])+\\]", text)
        for text, _ in await chat(service, structured_outputs=dotted, **way):
            jsonschema.validate(json.loads(text.replace(".", "")), schema)
        for text, finish in await chat(service, response_format={"type": "json_object"}, **way):
            assert text.startswith("{")
            assert finish == "length" or isinstance(json.loads(text), dict)


async def test_other_wishes(service: ApiService) -> None:
    yes_no = {"structured_outputs": {"choice": ["yes", "no"]}}
    # As in any answer, a stop string ends it; the grammar's own last token is part of it.
    assert await chat(service, structured_outputs={"choice": ["abc"]}, stop="b") == [("a", "stop")]
    assert (await chat(service, **yes_no, min_tokens=100, max_tokens=300))[0][1] == "stop"
    [(text, _)] = await chat(service, **yes_no, bad_words=["yes", "y"], temperature=0)
    assert text in ("yes", "no")
    body: Any = await service.completions(
        {"prompt": [5], "max_tokens": 9, "logprobs": 2, "return_token_ids": True, **yes_no}
    )
    [choice] = body["choices"]
    assert choice["text"] in ("yes", "no")
    assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    assert body["usage"]["completion_tokens"] == len(choice["token_ids"])


async def test_a_dead_end_is_one_answers_own(service: ApiService) -> None:
    yes_no: Json = {"structured_outputs": {"choice": ["yes", "no"]}}
    other = asyncio.create_task(chat(service, max_tokens=30))
    with pytest.raises(ApiError, match="allowed_token_ids") as refused:
        await chat(service, **yes_no, allowed_token_ids=[5])
    assert (refused.value.status, refused.value.code) == (400, "sequence_refused")
    with pytest.raises(ApiError, match="unknown special token"):
        await chat(service, structured_outputs={"grammar": "start: <|nobody|>"}, stream=True)
    assert await other
    assert (await chat(service, **yes_no))[0][0] in ("yes", "no")


@pytest.mark.parametrize(
    ("model", "without"),
    [
        ("nano-dbrx", "tokenizer.json"),
        ("nano-phimoe", "tokenizer.json"),
        ("nano-phimoe", "tokenizer.model"),
    ],
)
async def test_every_kind_of_tokenizer(model: str, without: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(nano_checkpoint(model), folder)
    (folder / without).unlink()
    schema = {"type": "array", "items": {"enum": ["né", 12, None]}, "minItems": 1, "maxItems": 3}
    with running_service(folder) as service:
        for way in ways(1):
            answers = await chat(service, structured_outputs={"json": schema}, **way)
            for text, finish in answers:
                assert finish == "stop"
                jsonschema.validate(json.loads(text), schema)
            for text, _ in await chat(service, structured_outputs={"regex": "[a-z]+ é!"}, **way):
                assert re.fullmatch("[a-z]+ é!", text)
