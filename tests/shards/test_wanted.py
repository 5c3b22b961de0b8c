"""Logits, hidden states, router logits and prompt log-probabilities from running workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from router.step import NO_TOKEN, FinishReason, SamplingParams, Want, WantedRows
from shards.group import ModelGroup
from shards.outputs import Outputs
from shards.wanted import rows_of
from tests.groups import running_group
from tests.tiny import FAMILIES, VOCAB_SIZE, load_reference, write_tiny

PROMPT = tuple(int(t) for t in torch.randint(VOCAB_SIZE, (40,), generator=torch.manual_seed(1)))
EVERYTHING = Want(logits=True, hidden_states=True, router_logits=True, prompt_logprobs=3)
COMPUTE = SamplingParams(max_tokens=0)

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "local": {"executor": "local", "max_num_batched_tokens": 64},
    "2x3 in chunks": {"stages": 2, "expert_shards": 3, "max_num_batched_tokens": 7},
    "one stage ahead, in chunks": {"stages": 1, "expert_shards": 2, "max_num_batched_tokens": 5},
}

Arrays = dict[str, NDArray[np.generic]]


async def compute(group: ModelGroup, want: Want, prompt: tuple[int, ...] = PROMPT) -> Arrays:
    stream = group.generate(prompt, COMPUTE, want=want)
    tokens = [token async for token in stream]
    assert [(t.token_id, t.finish) for t in tokens] == [(NO_TOKEN, FinishReason.LENGTH)]
    return stream.outputs


def close(actual: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(actual), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_array_is_transformers_on_every_topology(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path)
    model = load_reference(folder)
    seen: list[Arrays] = []
    for options in TOPOLOGIES.values():
        with running_group(folder, **options) as group:
            # Others in the same steps, some of whom generate.
            others = [group.generate(PROMPT[:n], SamplingParams(max_tokens=9)) for n in (3, 20)]
            seen.append(await compute(group, EVERYTHING))
            for other in others:
                assert len([token async for token in other]) == 9
                assert other.outputs == {}
    for other_arrays in seen[1:]:
        assert seen[0].keys() == other_arrays.keys()
        for name, array in seen[0].items():
            assert array.tobytes() == other_arrays[name].tobytes(), f"{name} depends on topology"
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor([PROMPT]),
            use_cache=False,
            output_hidden_states=True,
            output_router_logits=True,
        )
    arrays = seen[0]
    close(arrays["logits"], expected.logits[0])
    for i, hidden in enumerate(expected.hidden_states):
        close(arrays[f"hidden_states.{i}"], hidden[0])
    routers = sorted((n for n in arrays if n.startswith("router")), key=lambda n: int(n[14:]))
    assert len(routers) == len(expected.router_logits)
    for name, logits in zip(routers, expected.router_logits, strict=True):
        close(arrays[name], logits.reshape(len(PROMPT), -1))
    logprobs = torch.log_softmax(expected.logits[0].float(), -1)[:-1]
    targets = torch.tensor(PROMPT[1:])[:, None]
    close(arrays["prompt_logprobs"][:, :1], logprobs.gather(1, targets))
    close(arrays["prompt_logprobs"][:, 1:], logprobs.topk(3).values)
    assert (arrays["prompt_top_ids"][:, 0] == np.array(PROMPT[1:])).all()
    assert (arrays["prompt_top_ids"][:, 1:] == logprobs.topk(3).indices.numpy()).all()
    ranks = (logprobs > logprobs.gather(1, targets)).sum(-1) + 1
    assert (arrays["prompt_ranks"] == ranks.numpy()).all()


async def test_only_the_wanted_positions(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    with running_group(folder, **TOPOLOGIES["2x3 in chunks"]) as group:
        whole = await compute(group, Want(logits=True))
        some = await compute(group, Want(logits=True, logits_positions=(0, 6, 7, 39)))
        assert list(some) == ["logits"]
        assert (some["logits"] == whole["logits"][[0, 6, 7, 39]]).all()
        # One token of prompt has no log-probability at all, and a batch of many is no other.
        assert await compute(group, Want(prompt_logprobs=1), PROMPT[:1]) == {}
        many = await asyncio.gather(*(compute(group, Want(logits=True)) for _ in range(5)))
        assert all((arrays["logits"] == whole["logits"]).all() for arrays in many)


async def test_prompt_logprobs_come_before_the_first_token(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path)
    sampling = SamplingParams(max_tokens=20, temperature=0)
    with running_group(folder, **TOPOLOGIES["2x3 in chunks"]) as group:
        expected = await compute(group, Want(prompt_logprobs=2))
        stream = group.generate(PROMPT, sampling, want=Want(prompt_logprobs=2))
        async for token in stream:
            # Its LongRoPE regime changes on the way; the prompt's numbers stay the prompt's.
            for name, array in expected.items():
                assert (stream.outputs[name] == array).all(), f"token {token.position}: {name}"


def test_rows_in_any_order_and_again() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    outputs = Outputs(Want(hidden_states=True), num_prompt=6)
    for start, stop in ((0, 2), (0, 4), (4, 6), (2, 5)):
        outputs.put(rows_of(1, "hidden_states.0", start, values[start:stop]))
    assert (outputs.arrays["hidden_states.0"] == values.numpy()).all()


def test_ids_stay_whole_numbers() -> None:
    big = 2**53 + 1
    rows: WantedRows = rows_of(1, "prompt_top_ids", 0, torch.tensor([[big]]))
    outputs = Outputs(Want(prompt_logprobs=0), num_prompt=2)
    outputs.put(rows)
    assert int(outputs.arrays["prompt_top_ids"][0, 0]) == big
