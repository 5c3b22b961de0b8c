"""All families: positions kept, further outputs, expert placements, batch orders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.interface import Routing
from models.registry import load_config
from router.placement import Placement
from router.step import StepPlan, StepResult, Want
from shards.checkpoint import Checkpoint
from shards.expert_backend import ExchangeKey, Handle, LocalExpertBackend
from shards.kv_cache import allocate_caches
from shards.loading import load_experts, load_stage
from shards.model_runner import ModelRunner
from tests.models.driver import tokens_of
from tests.models.oracle import tiny
from tests.parity.battery import (
    Arrays,
    assert_close,
    assert_every_way,
    assert_everywhere,
    assert_same_bits,
)
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.executors import LocalRunner, limits_of, pipeline, random_placement
from tests.parity.remedies import full_forward, logits_of
from tests.parity.session import Session, in_one_batch
from tests.tiny import FAMILIES

ALIKE = [tokens_of(21, 11), tokens_of(22, 11), tokens_of(23, 11)]
MIXED = [tokens_of(24, 28), tokens_of(25, 1), tokens_of(26, 9), tokens_of(27, 2), tokens_of(28, 19)]

each_family = pytest.mark.parametrize("family", FAMILIES)


def local_arrays(folder: Path, model: Any, sequences: Sequence[Sequence[int]]) -> list[Arrays]:
    """The local executor's packed batch, which has the reference's numbers."""
    packed = in_one_batch(Session(LocalRunner(folder)), sequences)
    for arrays, expected in zip(packed, logits_of(model, sequences), strict=True):
        assert_close(arrays["logits"], expected)
    return packed


@case(62, "all", "logits of the kept positions: all, the last, the last n, any")
@each_family
@pytest.mark.parametrize(
    ("keep", "positions"),
    [
        pytest.param(0, (), id="all"),
        pytest.param(1, (10,), id="last"),
        pytest.param(3, (8, 9, 10), id="last three"),
        pytest.param([0, 3, 7], (0, 3, 7), id="some"),
    ],
)
def test_kept_positions(
    tmp_path: Path, corrected: Any, family: str, keep: Any, positions: tuple[int, ...]
) -> None:
    folder = tiny(family, tmp_path)
    model = corrected(folder)
    kept = torch.tensor(keep) if isinstance(keep, list) else keep
    expected = [full_forward(model, t, logits_to_keep=kept).logits[0] for t in ALIKE]
    want = Want(logits=True, logits_positions=positions)
    assert_everywhere(folder, ALIKE, expected, want=want)


@case(62, "all", "hidden states in Transformers' order and router logits of the MoE layers")
@each_family
def test_further_arrays(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path)
    model, config = corrected(folder), load_config(folder)
    options = {"output_hidden_states": True, "output_router_logits": True}
    references = [full_forward(model, tokens, **options) for tokens in MIXED]
    want = Want(logits=True, hidden_states=True, router_logits=True)
    expected = [reference.logits[0] for reference in references]
    packed = assert_everywhere(folder, MIXED, expected, want=want)
    moe_layers = [i for i in range(config.num_layers) if config.is_moe_layer(i)]
    for arrays, reference in zip(packed, references, strict=True):
        names = {f"hidden_states.{i}": rows[0] for i, rows in enumerate(reference.hidden_states)}
        routers = zip(moe_layers, reference.router_logits, strict=True)
        names |= {f"router_logits.{i}": rows for i, rows in routers}
        assert arrays.keys() == {"logits", *names}
        for name, rows in names.items():
            assert_close(arrays[name], rows, name)


@case(63, "all", "any expert on any shard, also where a shard holds none")
@each_family
def test_random_placements(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path)
    packed = local_arrays(folder, corrected(folder), MIXED)
    config = load_config(folder)
    placements = [random_placement(config, 3, random.Random(seed)) for seed in range(2)]
    placements += [
        Placement(num_shards=4, shards=((2,), (3,), (0,), (1,))),
        Placement(num_shards=3, shards=((2,), (0,), (2,), (2, 0))),
    ]
    assert not placements[-1].held_by(1)
    for placement in placements:
        with pipeline(folder, placement=placement) as runner:
            assert_every_way(Session(runner), MIXED, packed, where=str(placement))


IDLE = (3, 4, 5)
SIX_EXPERTS: dict[str, dict[str, Any]] = {
    "dbrx": {"ffn_config": {"moe_num_experts": 6}},
    "phimoe": {"num_local_experts": 6},
    "jamba": {"num_experts": 6},
}


@case(63, "all", "an expert that receives no token, and a shard of such experts alone")
@each_family
def test_idle_experts(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path, **SIX_EXPERTS[family])
    _never_choose(folder, IDLE)
    model = corrected(folder)
    for logits in full_forward(model, MIXED[0], output_router_logits=True).router_logits:
        assert not torch.isin(logits.topk(2).indices, torch.tensor(IDLE)).any()
    expected = logits_of(model, MIXED)
    # Not a number: what no token may ever meet.
    _poison(folder, IDLE)
    packed = in_one_batch(Session(LocalRunner(folder)), MIXED)
    for arrays, reference in zip(packed, expected, strict=True):
        assert_close(arrays["logits"], reference)
    placement = Placement(num_shards=3, shards=((0,), (1,), (1,), (0,), (2,), (2, 0)))
    with pipeline(folder, placement=placement) as runner:
        assert_every_way(Session(runner), MIXED, packed)


def _never_choose(folder: Path, experts: Sequence[int]) -> None:
    """A large first component in every row, and gates that shun some experts because of it."""
    with tensors_of(folder) as tensors:
        for name, tensor in tensors.items():
            if name.endswith(("wte.weight", "embed_tokens.weight")):
                tensor[:, 0] = 20.0
            elif name.endswith(("router.layer.weight", "router.weight", "gate.weight")):
                tensor[:, 0] = 0.0
                tensor[list(experts)] = 0.0
                tensor[list(experts), 0] = -10.0


def _poison(folder: Path, experts: Sequence[int]) -> None:
    config = load_config(folder)
    with tensors_of(folder) as tensors:
        for layer_idx in range(config.num_layers):
            if config.is_moe_layer(layer_idx):
                for expert in experts:
                    for part in config.expert_tensors(layer_idx, expert).values():
                        source = next(s for s in part.sources if s.name in tensors)
                        tensors[source.name][source.start : source.stop] = torch.nan


@case(64, "all", "sequences in any order in the batch")
@each_family
def test_batch_orders(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path)
    packed = local_arrays(folder, corrected(folder), MIXED)
    with pipeline(folder) as runner:
        for session in (Session(LocalRunner(folder)), Session(runner)):
            for seed in range(4):
                order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
                turned = in_one_batch(session, [MIXED[i] for i in order])
                for i, arrays in zip(order, turned, strict=True):
                    assert_same_bits(arrays, packed[i], f"order {order}")


@case(64, "all", "one micro-batch or two")
@each_family
def test_micro_batches(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path)
    packed = local_arrays(folder, corrected(folder), MIXED)
    for num_micro_batches in (1, 2):
        runner = MicroBatchRunner(folder, num_micro_batches)
        again = in_one_batch(Session(runner), MIXED)
        assert runner.micro_batches == set(range(num_micro_batches))
        for mine, other in zip(again, packed, strict=True):
            assert_same_bits(mine, other, f"{num_micro_batches} micro-batches")
        assert_every_way(Session(MicroBatchRunner(folder, num_micro_batches)), MIXED, packed)


class MicroBatchRunner:
    """The whole model in this thread, with a number of micro-batches; notes which there were."""

    epoch = 1

    def __init__(self, folder: Path, num_micro_batches: int) -> None:
        self.config = load_config(folder)
        self.limits = limits_of(self.config)
        self.micro_batches: set[int] = set()
        config, checkpoint, dtype = self.config, Checkpoint(folder), torch.float32
        count = config.num_layers
        bank = load_experts(config, checkpoint, range(config.num_experts), dtype)
        self._experts = LocalExpertBackend(bank, config.num_experts)
        self._runner = ModelRunner(
            config,
            load_stage(config, checkpoint, 0, count, dtype),
            0,
            count,
            allocate_caches(
                config,
                range(count),
                num_blocks=self.limits.num_blocks,
                block_size=self.limits.block_size,
                num_state_rows=self.limits.num_state_rows,
                dtype=dtype,
            ),
            self,
            block_size=self.limits.block_size,
            dtype=dtype,
            few_tokens=0 if num_micro_batches == 2 else None,
        )

    def submit(self, key: ExchangeKey, layer_idx: int, hidden: Tensor, routing: Routing) -> Handle:
        self.micro_batches.add(key.micro_batch)
        return self._experts.submit(key, layer_idx, hidden, routing)

    def run(self, plan: StepPlan) -> StepResult:
        done = self._runner.execute(plan)
        assert isinstance(done.output, StepResult)
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, wanted=done.wanted)
