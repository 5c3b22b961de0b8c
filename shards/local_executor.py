"""The whole model in the engine's process: the simplest executor, and the pipeline's oracle."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from models.interface import ModelConfig
from models.kernels.native import use_kernels
from models.registry import load_config
from router.engine import EngineLimits
from router.step import StepPlan, StepResult
from shards.checkpoint import Checkpoint
from shards.expert_backend import LocalExpertBackend
from shards.kv_cache import allocate_caches
from shards.load_progress import OnRead
from shards.loading import load_experts, load_stage
from shards.logits_processors import IdRanges
from shards.model_runner import ModelRunner
from shards.spec import GroupSpec
from shards.threads import dtype_of, use_threads
from shards.verify import verify


class LocalExecutor:
    """Runs every plan on one runner over all layers, in the caller's thread, during `poll`.

    Without `limits` it is of use only after `allocate`. Raises CheckpointError when the checkpoint
    does not hold exactly this model.
    """

    max_in_flight = 1

    def __init__(
        self,
        config: ModelConfig,
        model_path: Path | str,
        dtype: torch.dtype,
        limits: EngineLimits | None,
        on_read: OnRead | None = None,
        *,
        quantization: str = "none",
        unused_ids: IdRanges = (),
    ) -> None:
        checkpoint = Checkpoint(model_path, on_read)
        config = config.with_tensors(checkpoint.names)
        verify(config, checkpoint)
        every = range(config.num_experts)
        self._config = config
        self._dtype = dtype
        self._unused_ids = unused_ids
        self._stage = load_stage(
            config, checkpoint, 0, config.num_layers, dtype, quantization=quantization
        )
        self._experts = LocalExpertBackend(
            load_experts(config, checkpoint, every, dtype, quantization=quantization),
            config.num_experts,
        )
        self._epoch: int | None = None
        self._plans: deque[StepPlan] = deque()
        self.bytes_read = checkpoint.bytes_read
        if limits is not None:
            self.allocate(limits)

    def allocate(self, limits: EngineLimits) -> None:
        """Make the caches that plans within `limits` use."""
        num_layers = self._config.num_layers
        self._runner = ModelRunner(
            self._config,
            self._stage,
            0,
            num_layers,
            allocate_caches(
                self._config,
                range(num_layers),
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                num_state_rows=limits.num_state_rows,
                dtype=self._dtype,
            ),
            self._experts,
            block_size=limits.block_size,
            dtype=self._dtype,
            unused_ids=self._unused_ids,
        )

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


def load_local_executor(group: GroupSpec, on_read: OnRead | None = None) -> LocalExecutor:
    """The local executor of a group as its spec describes it, still without caches."""
    use_threads(group.threads)
    use_kernels(group.kernels)
    config = load_config(Path(group.model_path))
    return LocalExecutor(
        config,
        group.model_path,
        dtype_of(group.dtype),
        None,
        on_read,
        quantization=group.quantization,
        unused_ids=group.unused_token_ids,
    )
