"""`prompt_logprobs` and `echo` over HTTP: a prompt's own log-probabilities, as Transformers has
them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from deploy.demo import nano_checkpoint
from deploy.http_api import build_api
from deploy.prompts import Echo, Prompt
from router.step import SamplingParams
from tests.deploy.conftest import Api, load_nano, running_service
from tests.tiny import load_reference, reference_logits, write_tiny

NANO = load_nano("nano-jamba")
assert NANO.tokenizer is not None
TOKENIZER = NANO.tokenizer
TEXT = "What is the capital of France? Café!"
IDS = TOKENIZER.encode(TEXT, add_special_tokens=True)
GREEDY = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
LOCAL = {"executor": "local", "max_num_batched_tokens": 16, "max_model_len": 64}


@pytest.fixture(scope="module")
def logprobs() -> torch.Tensor:
    """[len(IDS), V] float32: row i is what position i says of the next token."""
    model = load_reference(nano_checkpoint("nano-jamba"))
    return torch.log_softmax(reference_logits(model, IDS), dim=-1)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    with running_service(nano_checkpoint("nano-jamba"), **LOCAL) as service:
        transport = httpx.ASGITransport(app=build_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json={**GREEDY, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def check_vllm_shape(
    rows: list[dict[str, Any] | None], ids: tuple[int, ...], logprobs: torch.Tensor, num_best: int
) -> None:
    assert rows[0] is None
    assert len(rows) == len(ids)
    for row, token_id, expected in zip(rows[1:], ids[1:], logprobs, strict=False):
        assert row is not None
        best = [int(i) for i in expected.topk(num_best).indices] if num_best else []
        assert list(row) == list(dict.fromkeys(map(str, (token_id, *best))))
        for key, entry in row.items():
            assert entry["logprob"] == pytest.approx(float(expected[int(key)]), abs=1e-4)
            assert entry["rank"] == 1 + int((expected > expected[int(key)]).sum())
            raw = TOKENIZER.token_bytes(int(key))
            assert entry["decoded_token"] == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("num_best", [0, 3, 20])
async def test_completions(
    client: httpx.AsyncClient, logprobs: torch.Tensor, num_best: int
) -> None:
    prompts = [TEXT, TOKENIZER.decode(IDS[1:6])]
    reply = await ask(client, "/v1/completions", prompt=prompts, n=2, prompt_logprobs=num_best)
    assert len(reply["choices"]) == 4
    for choice in reply["choices"][:2]:
        check_vllm_shape(choice["prompt_logprobs"], IDS, logprobs, num_best)
    assert reply["choices"][2]["prompt_logprobs"] == reply["choices"][3]["prompt_logprobs"]
    one = await ask(client, "/v1/completions", prompt=[5], prompt_logprobs=num_best)
    assert one["choices"][0]["prompt_logprobs"] == [None]
    without = await ask(client, "/v1/completions", prompt=TEXT)
    assert "prompt_logprobs" not in without["choices"][0]


async def test_chat(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    reply = await ask(
        client, "/v1/chat/completions", messages=messages, prompt_logprobs=2, return_token_ids=True
    )
    ids = tuple(reply["prompt_token_ids"])
    model = load_reference(nano_checkpoint("nano-jamba"))
    expected = torch.log_softmax(reference_logits(model, ids), dim=-1)
    check_vllm_shape(reply["prompt_logprobs"], ids, expected, 2)
    assert "prompt_logprobs" not in reply["choices"][0]


def check_legacy_shape(legacy: dict[str, list[Any]], logprobs: torch.Tensor) -> None:
    """OpenAI's arrays, whose first rows are the prompt's."""
    num = len(IDS)
    assert legacy["token_logprobs"][0] is None
    assert legacy["top_logprobs"][0] is None
    targets = torch.tensor(IDS[1:])[:, None]
    chosen = logprobs[: num - 1].gather(1, targets)[:, 0].tolist()
    assert legacy["token_logprobs"][1:num] == pytest.approx(chosen, abs=1e-4)
    for i in range(1, num):
        best = float(logprobs[i - 1].max())
        assert max(legacy["top_logprobs"][i].values()) == pytest.approx(best, abs=1e-4)
        assert legacy["tokens"][i] in legacy["top_logprobs"][i]
    assert len({len(values) for values in legacy.values()}) == 1


async def test_echo(client: httpx.AsyncClient, logprobs: torch.Tensor) -> None:
    plain = (await ask(client, "/v1/completions", prompt=TEXT, logprobs=2))["choices"][0]
    reply = await ask(
        client, "/v1/completions", prompt=TEXT, echo=True, logprobs=2, return_token_ids=True
    )
    choice = reply["choices"][0]
    assert choice["text"] == TEXT + plain["text"]
    assert len(choice["token_ids"]) == 3
    assert reply["usage"]["completion_tokens"] == 3
    check_legacy_shape(choice["logprobs"], logprobs)
    num = len(IDS)
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert choice["logprobs"][name][num:] == plain["logprobs"][name]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[num:] == [len(TEXT) + offset for offset in plain["logprobs"]["text_offset"]]
    for token, at in zip(choice["logprobs"]["tokens"][1:num], offsets[1:num], strict=True):
        spellings = (token, token.removeprefix(" "))
        assert token.startswith("bytes:") or TEXT[at:].startswith(spellings)
    without = await ask(client, "/v1/completions", prompt=list(IDS), echo=True)
    assert without["choices"][0]["text"] == choice["text"]
    assert without["choices"][0]["logprobs"] is None


async def test_scoring_alone(client: httpx.AsyncClient, logprobs: torch.Tensor) -> None:
    body = {"prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": 0}
    reply = await ask(client, "/v1/completions", **body, prompt_logprobs=1, return_token_ids=True)
    choice = reply["choices"][0]
    assert choice["text"] == TEXT
    assert choice["finish_reason"] == "length"
    assert choice["token_ids"] == []
    assert reply["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == len(IDS)
    check_vllm_shape(choice["prompt_logprobs"], IDS, logprobs, 1)
    full = await client.post("/v1/completions", json={**body, "prompt": [5] * 64})
    assert full.status_code == 200, "a prompt alone may fill the whole context"
    more = await client.post("/v1/completions", json={**body, "prompt": [5] * 65})
    assert more.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_echo_streams_with_the_first_chunk(
    client: httpx.AsyncClient, max_tokens: int
) -> None:
    body = {"prompt": [TEXT, "Hi"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    whole = await ask(client, "/v1/completions", **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json={**GREEDY, **body, **options})
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values


async def test_an_echo_does_not_wait_for_text(make_api: Callable[..., Api]) -> None:
    api = make_api("é")  # whose first token is a part of a character
    assert len(api.client.script((), SamplingParams(max_tokens=9))) > 2
    body = {"prompt": "Caf", "echo": True, "stream": True, "max_tokens": 9}
    chunks = await api.service.completions(body)
    assert not isinstance(chunks, dict)
    texts = [chunk["choices"][0]["text"] async for chunk in chunks]
    assert texts[0] == "Caf"
    assert "".join(texts) == "Café"


async def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    prompt = (5, 6, 7, 8)
    with running_service(folder, **LOCAL) as service:
        body = {"prompt": list(prompt), "echo": True, "logprobs": 1, "max_tokens": 0}
        reply = await service.completions({**body, "prompt_logprobs": 1})
    assert isinstance(reply, dict)
    choice = reply["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in prompt]
    assert all(
        e["decoded_token"] is None for r in choice["prompt_logprobs"][1:] for e in r.values()
    )
    expected = torch.log_softmax(reference_logits(load_reference(folder), prompt), dim=-1)
    chosen = [float(expected[i, token_id]) for i, token_id in enumerate(prompt[1:])]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)


@pytest.mark.parametrize(
    "text",
    ["", "one two", " one", "Café", "é", "<|bom|><|user|> Hi<|eom|>", "a\n\nb", "日本語 and 🙂"],
)
def test_offsets_lie_on_the_tokens_own_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=True)
    echo = Echo.of(Prompt(token_ids=ids, text=text), TOKENIZER, skip_special_tokens=True)
    assert echo.text == text
    assert len(echo.offsets) == len(ids)
    assert list(echo.offsets) == sorted(echo.offsets)
    if not text:
        return
    for token_id, at, end in zip(ids, echo.offsets, [*echo.offsets[1:], len(text)], strict=True):
        raw = TOKENIZER.token_bytes(token_id)
        if token_id == ids[0]:  # the added BOS
            assert at == end == 0
        elif b"\xff" not in raw and raw.isascii():
            assert text[at:end] in (raw.decode(), raw.decode().removeprefix(" "))


def test_token_ids_echo_their_text() -> None:
    echo = Echo.of(Prompt(token_ids=IDS), TOKENIZER, skip_special_tokens=True)
    assert echo.text == TOKENIZER.decode(IDS)
    special = Echo.of(Prompt(token_ids=IDS), TOKENIZER, skip_special_tokens=False)
    assert special.text == TOKENIZER.decode(IDS, skip_special_tokens=False)
