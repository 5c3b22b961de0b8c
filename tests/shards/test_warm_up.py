"""One token before a group is ready: it passes everywhere, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from router.step import SamplingParams
from shards.actions import BeginEpoch, Suspend, Tell
from shards.client import GroupState
from shards.control import Control
from shards.group import ModelGroup
from shards.spec import WarmUp
from shards.supervisor import Supervisor
from tests.groups import Answer, ask, running_group
from tests.layouts import read_tensors, write_tensors
from tests.shards.test_supervisor import World, group_spec
from tests.tiny import write_tiny

WARM = WarmUp(token_id=7, max_tokens=1)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=6, seed=5)
LAYOUTS: list[dict[str, Any]] = [
    {"executor": "local"},
    {"stages": 2, "expert_shards": 2},
    {"stages": 2, "expert_shards": 2, "dispatch": "direct"},
]


async def answers(group: ModelGroup) -> list[Answer]:
    # The first prompt begins as the warm-up's does: with a token that it has computed.
    return [await ask(group, prompt, s) for prompt in ((7, 7), (7,)) for s in (GREEDY, SAMPLED)]


async def counted(group: ModelGroup) -> dict[int, tuple[int, list[int]]]:
    """Exchanges and tokens by layer, once the workers' signs of life have told all of them."""
    seen = None
    while True:
        totals = group.layer_totals
        told = {layer: (t.exchanges, t.tokens) for layer, t in totals.items()}
        if told == seen:
            return told
        seen = told
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("options", LAYOUTS)
async def test_it_leaves_nothing_behind(options: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path)
    options = {**options, "block_size": 1}  # where even one token is a whole block
    with running_group(folder, **options) as group:
        assert group.start_record.first_token_s == 0.0
        expected = await answers(group)
        load, dispatched = replace(group.load, running=0), await counted(group)
    with running_group(folder, warm_up=WARM, **options) as group:
        assert group.state is GroupState.READY
        assert group.start_record.first_token_s > 0.0
        assert await counted(group) == {}
        assert group.load.prefix_tokens == group.load.used_blocks == group.load.used_snapshots == 0
        assert await answers(group) == expected
        assert replace(group.load, running=0) == load
        assert await counted(group) == dispatched
        assert next(group._seq_ids) == len(expected) + 1


async def test_a_model_that_is_not_finite_there_still_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny("dbrx", tmp_path)
    with running_group(folder, executor="local") as group:
        expected = await ask(group, (8, 9), GREEDY)
    assert 7 not in expected.token_ids
    tensors = read_tensors(folder)
    tensors["transformer.wte.weight"][7] = torch.tensor(float("nan"))
    write_tensors(folder, tensors)
    with running_group(folder, executor="local", warm_up=WARM) as group:
        assert "the first token cannot be made: it is not finite" in caplog.text
        assert await ask(group, (8, 9), GREEDY) == expected


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_smallest_context_is_enough(max_tokens: int, tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    warm_up = WarmUp(token_id=7, max_tokens=max_tokens)
    with running_group(folder, executor="local", max_model_len=2, warm_up=warm_up) as group:
        assert group.state is GroupState.READY


def warm_world() -> World:
    """A group whose first epoch, the warm-up's, has begun."""
    world = World(replace(group_spec(), warm_up=WARM))
    world.settle()
    assert world.epochs == [1]
    return world


def test_ready_is_who_has_made_a_token() -> None:
    supervisor: Supervisor = warm_world().supervisor
    assert supervisor.state is GroupState.STARTING
    actions = supervisor.on_warm()
    begin = Control(epoch=2, keep_cache=False)
    assert actions == [Suspend(), Tell("engine-0", begin), BeginEpoch(2)]
    assert supervisor.state is GroupState.READY


def test_a_death_before_the_token_does_not_make_it_ready() -> None:
    world = warm_world()
    world.die("stage-1", 0.0)
    assert world.supervisor.state is GroupState.STARTING
    world.settle()
    assert world.epochs == [1, 2]
    assert world.supervisor.state is GroupState.STARTING
    assert world.supervisor.on_warm()[-1] == BeginEpoch(3)
    assert world.supervisor.state is GroupState.READY
