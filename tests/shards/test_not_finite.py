"""A model that computes NaN or infinity: its sequences end with an error, the others go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from router.step import SamplingParams
from shards.client import SequenceFailed, SequenceRefused
from tests.groups import ask, running_group
from tests.layouts import read_tensors, write_tensors
from tests.tiny import write_tiny

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"executor": "local"}, {"stages": 2, "expert_shards": 2}])
async def test_only_the_sequences_that_meet_it_end(
    options: dict[str, Any], value: float, tmp_path: Path
) -> None:
    folder = write_tiny("dbrx", tmp_path)
    with running_group(folder, **options) as group:
        expected = await ask(group, (7, 8, 9), GREEDY)
    unlucky = next(t for t in range(20, 90) if t not in expected.token_ids)
    tensors = read_tensors(folder)
    tensors["transformer.wte.weight"][unlucky] = torch.tensor(value)
    write_tensors(folder, tensors)
    with running_group(folder, **options) as group:
        with pytest.raises(SequenceFailed, match="not finite"):
            await ask(group, (7, unlucky, 9), GREEDY)
        assert await ask(group, (7, 8, 9), GREEDY) == expected
        assert group.load.used_blocks == 0


@pytest.mark.parametrize("family", ["phimoe", "jamba"])
async def test_what_they_began_with_is_not_spoiled(family: str, tmp_path: Path) -> None:
    """Blocks in front of the bad token may have met it in a kernel's tile."""
    folder = write_tiny(family, tmp_path)
    tensors = read_tensors(folder)
    tensors["model.embed_tokens.weight"][90] = torch.tensor(float("nan"))
    write_tensors(folder, tensors)
    shared = tuple(20 + i % 30 for i in range(16))
    options: dict[str, Any] = {"executor": "local", "max_num_batched_tokens": 13}
    with running_group(folder, enable_prefix_caching=False, **options) as group:
        expected = await ask(group, (*shared, 7, 8), GREEDY)
    with running_group(folder, **options) as group:
        with pytest.raises(SequenceFailed, match="not finite"):
            await ask(group, (*shared, 90, 9, 9), GREEDY)
        assert await ask(group, (*shared, 7, 8), GREEDY) == expected


async def test_what_cannot_be_sent_is_refused_alone(tmp_path: Path) -> None:
    with running_group(write_tiny("dbrx", tmp_path), executor="local") as group:
        with pytest.raises(SequenceRefused, match="cannot be sent"):
            group.generate((1, 2), SamplingParams(max_tokens=2, stop_token_ids=(10**30,)))
        assert len((await ask(group, (1, 2), GREEDY)).token_ids) == 8
        assert group.failure == ""
