"""Jamba in the running engine: slots that change hands, states that are kept and copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.registry import load_config
from router.step import SamplingParams
from shards.cache_bytes import block_bytes, slot_bytes
from tests.groups import Answer, ask, ask_all, running_group
from tests.models.driver import tokens_of
from tests.parity.cases import case
from tests.parity.jamba import SHORT, jamba, schedule
from tests.parity.remedies import full_forward, load

MIXED = schedule((3, 1), (2, 1), 3)
PROMPTS = [tuple(tokens_of(20 + n, n)) for n in (6, 1, 11, 3, 2, 9, 7, 4)]
GREEDY = SamplingParams(max_tokens=14, temperature=0.0)

EXECUTORS: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "pipeline": {"executor": "pipeline", "stages": 2, "expert_shards": 3},
}
everywhere = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS.keys())


def assert_greedy(
    folder: Path, prompts: Sequence[tuple[int, ...]], answers: Sequence[Answer]
) -> None:
    """Every token is the reference's best after its prompt and the tokens before it."""
    model = load(folder, torch.float64)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == GREEDY.max_tokens
        logits = full_forward(model, [*prompt, *answer.token_ids[:-1]]).logits[0]
        best = logits[len(prompt) - 1 :].argmax(-1)
        assert answer.token_ids == tuple(best.tolist()), f"after a prompt of {len(prompt)} tokens"


@case(52, "Jamba", "slots change hands in the running engine")
@everywhere
async def test_more_sequences_than_slots(tmp_path: Path, executor: dict[str, Any]) -> None:
    """Eight sequences on two slots, in chunks of at most four tokens."""
    folder = jamba(tmp_path, **MIXED)
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 4}
    with running_group(folder, **executor, **options) as group:
        answers = await ask_all(group, PROMPTS, GREEDY)
        assert group.load.total_slots == 2
    assert_greedy(folder, PROMPTS, answers)


@case(52, "Jamba", "preempted sequences are computed again, or go on from a snapshot")
@everywhere
@pytest.mark.parametrize("snapshots", [0, 4], ids=["recomputed", "from snapshots"])
async def test_preempted_sequences(
    tmp_path: Path, snapshots: int, executor: dict[str, Any]
) -> None:
    """Two slots, but blocks for little more than one whole sequence; more sequences than slots, so
    that two of them always run, too long to end side by side. A state takes less than a block
    here, so that there is room for snapshots in the quarter of the memory that is theirs."""
    prompts = [tuple(tokens_of(40 + n, 9 + n % 3)) for n in range(6)]
    narrow = {"mamba_d_state": 4, "mamba_expand": 1, "num_key_value_heads": 4}
    folder = jamba(tmp_path, **SHORT, **narrow)
    config = load_config(folder)
    layers, num_blocks = range(config.num_layers), 9
    states = (2 + snapshots) * slot_bytes(config, layers, 4)
    options: dict[str, Any] = {
        "max_num_seqs": 2,
        "max_model_len": 28,
        "block_size": 4,
        "kv_cache_memory": states + num_blocks * block_bytes(config, layers, 4, 4),
        "enable_prefix_caching": snapshots > 0,
    }
    with running_group(folder, **executor, **options) as group:
        crowded = await ask_all(group, prompts, GREEDY)
        load = group.load
        alone = [await ask(group, prompt, GREEDY) for prompt in prompts]
    assert (load.total_blocks, load.total_snapshots) == (num_blocks, snapshots)
    assert load.preemptions > 0
    # The prompts share nothing: whatever was found again is a sequence's own beginning.
    assert (load.prefix_hit_tokens > 0) == (snapshots > 0)
    assert crowded == alone
    assert_greedy(folder, prompts, crowded)


@case(52, "Jamba", "sequences that part after a common beginning, from copied states")
@everywhere
async def test_forks(tmp_path: Path, executor: dict[str, Any]) -> None:
    """One after another and all at once, parting at a block's end and within a block."""
    folder = jamba(tmp_path, **MIXED)
    root = tuple(tokens_of(5, 21))
    forks = [root, *((*root[:at], *tokens_of(at, 5)) for at in (8, 16, 18)), root[:17]]
    with running_group(folder, **executor, block_size=4) as group:
        answers = [await ask(group, prompt, GREEDY) for prompt in forks]
        assert group.load.prefix_hit_tokens >= 2 * 16, "two of them part where a state was kept"
        at_once = await ask_all(group, forks[::-1], GREEDY)
    assert at_once[::-1] == answers
    assert_greedy(folder, forks, answers)
