"""Many streams at once: none fails, and each is its own answer in order."""

from __future__ import annotations

import asyncio
import os
from random import Random
from typing import Any

import pytest

from deploy.demo import nano_checkpoint
from deploy.service import ApiService
from tests.deploy.conftest import running_service
from tests.deploy.open_streams import Connection, listening

NUM_STREAMS = 256 if os.environ.get("CONCLAVE_SLOW") else 64


def requests(seed: int) -> list[dict[str, Any]]:
    """Chats and completions of every length, greedy and seeded, one to three choices."""
    rng = Random(seed)
    found = []
    for number in range(NUM_STREAMS):
        body: dict[str, Any] = {"max_tokens": rng.randrange(1, 40), "seed": number}
        body |= {"temperature": rng.choice([0, 0.9]), "ignore_eos": rng.random() < 0.5}
        body["n"] = rng.choice([1, 1, 1, 1, 2, 3])
        if number % 2:
            body["prompt"] = [rng.randrange(5, 100) for _ in range(rng.randrange(1, 60))]
        else:
            content = f"What is {rng.randrange(50)} + {rng.randrange(50)}?"
            body["messages"] = [{"role": "user", "content": content}]
        found.append(body)
    return found


async def streamed(port: int, body: dict[str, Any]) -> list[tuple[str, str]]:
    """Text and finish reason of each choice, put together in the order of arrival."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    connection = await Connection.post(port, path, {**body, **options})
    *chunks, last = await connection.events()
    assert last["choices"] == []
    text, finish = [""] * body["n"], [""] * body["n"]
    for chunk in chunks:
        [choice] = chunk["choices"]
        index = choice["index"]
        assert not finish[index], "nothing comes after the end"
        text[index] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        finish[index] = choice["finish_reason"] or ""
    return list(zip(text, finish, strict=True))


async def whole(service: ApiService, body: dict[str, Any]) -> list[tuple[str, str]]:
    """The same answer without a stream."""
    answer = await (service.chat(body) if "messages" in body else service.completions(body))
    assert isinstance(answer, dict)
    found = []
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        found.append((text, choice["finish_reason"]))
    return found


@pytest.mark.timeout(600)
async def test_many_streams_at_once_are_their_own_answers() -> None:
    todo = requests(3)
    folder = nano_checkpoint("nano-phimoe")
    with running_service(folder, max_num_seqs=NUM_STREAMS) as service:
        async with listening(service) as port:
            answers = await asyncio.gather(*(streamed(port, body) for body in todo))
        alone = [await whole(service, body) for body in todo]
    for number, (answer, own) in enumerate(zip(answers, alone, strict=True)):
        assert answer == own, f"request {number}: {todo[number]}"
    assert len(set(map(tuple, answers))) > NUM_STREAMS // 2, "they must differ to be told apart"
