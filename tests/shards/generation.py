"""Runs sequences through an EngineCore and an executor, and builds hand-wired executors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.registry import load_config
from router.engine import EngineCore, EngineLimits, Executor
from router.step import Admit, SamplingParams, StepPlan, StepResult, Token, WantedRows
from shards.checkpoint import Checkpoint
from shards.expert_backend import LocalExpertBackend
from shards.kv_cache import allocate_caches
from shards.loading import load_experts, load_stage
from shards.local_executor import LocalExecutor
from shards.model_runner import ModelRunner

ROOMY = EngineLimits(
    block_size=4,
    num_blocks=128,
    num_state_slots=0,
    max_num_seqs=8,
    max_num_batched_tokens=256,
    max_model_len=200,
)


def limits_for(folder: Path, **changes: int) -> EngineLimits:
    """ROOMY with the family's own needs, and `changes`."""
    config = load_config(folder)
    slots = 8 if config.family == "jamba" else 0
    limits = replace(ROOMY, num_state_slots=slots, reprefill_length=config.reprefill_length)
    return replace(limits, **changes)


def local(folder: Path, limits: EngineLimits, dtype: torch.dtype = torch.float32) -> LocalExecutor:
    """A LocalExecutor of a checkpoint."""
    return LocalExecutor(load_config(folder), folder, dtype, limits)


def greedy(seq_id: int, prompt: Iterable[int], max_tokens: int, logprobs: int = 2) -> Admit:
    """A greedy sequence of epoch 0."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=logprobs)
    return Admit(seq_id=seq_id, epoch=0, prompt=tuple(prompt), sampling=sampling)


def generate(
    executor: Executor, limits: EngineLimits, admits: Iterable[Admit]
) -> tuple[dict[int, list[Token]], int]:
    """All tokens of each sequence, and how many preemptions it took."""
    core = EngineCore(limits)
    tokens: dict[int, list[Token]] = {}
    for admit in admits:
        if admit.epoch > core.epoch:
            core.reset(admit.epoch)
        assert core.admit(admit) is None
        tokens[admit.seq_id] = []
    while core.has_work:
        plan = core.schedule()
        assert plan is not None
        executor.submit(plan)
        result = executor.poll(None)
        assert result is not None
        for token in core.apply(result):
            tokens[token.seq_id].append(token)
        core.check_invariants()
    return tokens, core.load().preemptions


class Chain:
    """An executor of several runners, each over its own layers, hidden states passed by hand."""

    max_in_flight = 1

    def __init__(
        self,
        folder: Path,
        limits: EngineLimits,
        stages: Iterable[tuple[int, int]],
        *,
        few_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = load_config(folder)
        checkpoint = Checkpoint(folder)
        bank = load_experts(config, checkpoint, range(config.num_experts), dtype)
        self.runners = [
            ModelRunner(
                config,
                load_stage(config, checkpoint, first, last, dtype),
                first,
                last,
                allocate_caches(
                    config,
                    range(first, last),
                    num_blocks=limits.num_blocks,
                    block_size=limits.block_size,
                    num_state_rows=limits.num_state_rows,
                    dtype=dtype,
                ),
                LocalExpertBackend(bank, config.num_experts),
                block_size=limits.block_size,
                dtype=dtype,
                few_tokens=few_tokens,
            )
            for first, last in stages
        ]
        self._results: list[StepResult] = []

    def submit(self, plan: StepPlan) -> None:
        """Run a plan through all runners."""
        passed: Tensor | StepResult | None = None
        wanted: tuple[WantedRows, ...] = ()
        for runner in self.runners:
            assert not isinstance(passed, StepResult)
            done = runner.execute(plan, passed)
            passed, wanted = done.output, wanted + done.wanted
            if isinstance(passed, Tensor):
                rows = sum(row.num_tokens for row in plan.scheduled)
                assert len(passed) == rows, "padding must not leave a stage"
        assert isinstance(passed, StepResult)
        self._results.append(replace(passed, wanted=wanted))

    def poll(self, timeout: float | None) -> StepResult | None:
        """The result of the plan just run."""
        return self._results.pop(0) if self._results else None
