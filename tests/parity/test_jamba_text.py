"""Jamba 1.5 in words: where answers end, one BOS to a chat, tags that survive decoding."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.service import ApiService
from tests.deploy.conftest import running_service
from tests.parity.cases import case
from tests.parity.jamba_text import BOS, EOM, EOS, SPECIAL, teach, write_talker
from tests.parity.remedies import load

EXECUTORS: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "pipeline": {"executor": "pipeline", "stages": 2, "expert_shards": 3},
}
everywhere = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS.keys())
CHAT = [{"role": "user", "content": "Wie hei\u00dft du?"}]


@case(61, "Jamba", "answers end at each of generation_config.json's EOS ids, and at no other")
@everywhere
@pytest.mark.parametrize(
    ("eos", "said"),
    [([EOS, EOM], EOS), ([EOS, EOM], EOM), (EOM, EOM), (EOM, EOS), (None, EOS), (None, EOM)],
    ids=["first", "second", "only one", "overruled", "of config.json", "unknown to config.json"],
)
async def test_ends(tmp_path: Path, eos: object, said: int, executor: dict[str, Any]) -> None:
    """config.json says 2, as published, which counts only without the other file."""
    write_talker(tmp_path, {"eos_token_id": eos})
    if eos is None:
        (tmp_path / "generation_config.json").unlink()
    prompt, answer = [BOS, 300, 301, 302], [310, 311, 312, said, 313, 314]
    teach(tmp_path, prompt, answer)
    theirs = load(tmp_path).generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False
    )
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    with running_service(tmp_path, **executor) as api:
        reply: Any = await api.completions(body)
        further: Any = await api.completions({**body, "ignore_eos": True})
    [choice], [on] = reply["choices"], further["choices"]
    assert choice["token_ids"] == theirs[0, len(prompt) :].tolist()
    ends = said in (eos if isinstance(eos, list) else [eos or EOS])
    assert choice["finish_reason"] == ("stop" if ends else "length")
    assert len(choice["token_ids"]) == (4 if ends else 6)
    assert (on["token_ids"], on["finish_reason"]) == (answer, "length")


@case(61, "Jamba", "one BOS, whether the template writes it or the tokenizer adds it")
@everywhere
async def test_one_bos(tmp_path: Path, executor: dict[str, Any]) -> None:
    tokenizer = write_talker(tmp_path, {"eos_token_id": [EOS, EOM]})
    options = {"max_tokens": 1, "return_token_ids": True}
    with running_service(tmp_path, **executor) as api:
        chat: Any = await api.chat({"messages": CHAT, **options})
        plain: Any = await api.completions({"prompt": CHAT[0]["content"], **options})
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert chat["prompt_token_ids"] == rendered
    assert rendered.count(BOS) == 1
    assert plain["prompt_token_ids"] == tokenizer(CHAT[0]["content"])["input_ids"]
    assert plain["prompt_token_ids"].count(BOS) == 1
    twice = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"]
    assert twice.count(BOS) == 2, "text with a BOS of its own gets another: the trap"


@case(61, "Jamba", "tool-call tags, special tokens all, survive decoding where they are asked for")
@everywhere
@pytest.mark.parametrize("skip", [False, True], ids=["tags wanted", "tags skipped"])
async def test_tool_calls(tmp_path: Path, skip: bool, executor: dict[str, Any]) -> None:
    tokenizer = write_talker(tmp_path, {"eos_token_id": [EOS, EOM]})
    text = '<tool_calls>[{"name": "f\u00fcr", "arguments": {}}]</tool_calls>'
    called = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert SPECIAL[called[0]] == "<tool_calls>"
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    teach(tmp_path, prompt, [*called, EOM])
    body = {"messages": CHAT, "temperature": 0, "skip_special_tokens": skip}
    with running_service(tmp_path, **executor) as api:
        reply: Any = await api.chat(body)
        pieces = [piece async for piece in await streamed(api, body)]
    expected = tokenizer.decode(called, skip_special_tokens=skip)
    assert expected == (
        text.replace("<tool_calls>", "").replace("</tool_calls>", "") if skip else text
    )
    [whole] = reply["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (expected, "stop")
    assert "".join(pieces) == expected


async def streamed(api: ApiService, body: dict[str, Any]) -> AsyncIterator[str]:
    """The pieces of a streamed chat's content."""
    chunks: Any = await api.chat({**body, "stream": True})

    async def contents() -> AsyncIterator[str]:
        async for chunk in chunks:
            for choice in chunk["choices"]:
                yield choice["delta"].get("content", "")

    return contents()
