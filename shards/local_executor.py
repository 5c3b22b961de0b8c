"""The whole model in the engine's process: the simplest executor, and the pipeline's oracle."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from models.interface import ModelConfig
from models.registry import load_config
from router.engine import EngineLimits
from router.step import StepPlan, StepResult
from shards.checkpoint import Checkpoint
from shards.expert_backend import LocalExpertBackend
from shards.kv_cache import allocate_caches
from shards.loading import load_experts, load_stage
from shards.model_runner import ModelRunner
from shards.spec import GroupSpec
from shards.threads import dtype_of, use_threads
from shards.verify import verify


class LocalExecutor:
    """Runs every plan on one runner over all layers, in the caller's thread, during `poll`.

    Raises CheckpointError when the checkpoint does not hold exactly this model.
    """

    max_in_flight = 1

    def __init__(
        self, config: ModelConfig, model_path: Path | str, dtype: torch.dtype, limits: EngineLimits
    ) -> None:
        checkpoint = Checkpoint(model_path)
        verify(config, checkpoint)
        num_layers = config.num_layers
        self._runner = ModelRunner(
            config,
            load_stage(config, checkpoint, 0, num_layers, dtype),
            0,
            num_layers,
            allocate_caches(
                config,
                range(num_layers),
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                num_state_slots=limits.num_state_slots,
                dtype=dtype,
            ),
            LocalExpertBackend(
                load_experts(config, checkpoint, range(config.num_experts), dtype),
                config.num_experts,
            ),
            block_size=limits.block_size,
            dtype=dtype,
            num_micro_batches=1,  # nothing to overlap: the experts run in this thread
        )
        self._epoch: int | None = None
        self._plans: deque[StepPlan] = deque()
        self.bytes_read = checkpoint.bytes_read

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; the first one of a new epoch makes the runner forget everything."""
        self._plans.append(plan)

    def poll(self, timeout: float | None) -> StepResult | None:
        """Run the oldest queued plan, however long it takes; None when there is none."""
        if not self._plans:
            return None
        plan = self._plans.popleft()
        if plan.epoch != self._epoch:
            self._runner.reset()
            self._epoch = plan.epoch
        done = self._runner.execute(plan)
        assert isinstance(done.output, StepResult)
        return replace(done.output, wanted=done.wanted)


def load_local_executor(group: GroupSpec) -> LocalExecutor:
    """The local executor of a group as its spec describes it."""
    use_threads(group.threads)
    config = load_config(Path(group.model_path))
    return LocalExecutor(config, group.model_path, dtype_of(group.dtype), group.limits)
