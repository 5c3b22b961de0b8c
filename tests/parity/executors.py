"""The two executors that every case runs on, driven by hand-made plans instead of a scheduler."""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from models.interface import ModelConfig
from models.registry import load_config
from router.engine import EngineLimits
from router.placement import Placement
from router.step import Abort, Admit, EngineLoad, StepPlan, StepResult, Token
from router.transport.base import Transport
from router.transport.sockets import SocketTransport
from shards.control import INGRESS
from shards.engine_worker import EngineWorker, PipelineExecutor
from shards.group import ModelGroup
from shards.local_executor import LocalExecutor
from shards.spec import GroupSpec, Role, WorkerSpec
from shards.worker import RunsForever, make_worker
from tests.groups import ThreadLauncher

LIMITS = EngineLimits(
    block_size=8,
    num_blocks=512,
    num_state_slots=0,
    max_num_seqs=64,
    max_num_batched_tokens=8192,
    max_model_len=8192,
)


class Runner(Protocol):
    """Runs one plan of epoch `epoch` after another."""

    config: ModelConfig
    limits: EngineLimits
    epoch: int

    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan to its result."""


class LocalRunner:
    """The whole model in this thread."""

    epoch = 1

    def __init__(self, folder: Path, dtype: str = "float32", quantization: str = "none") -> None:
        self.config = load_config(folder)
        self.limits = limits_of(self.config)
        torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._executor = LocalExecutor(
            self.config, folder, torch_dtype, self.limits, quantization=quantization
        )

    def run(self, plan: StepPlan) -> StepResult:
        self._executor.submit(plan)
        result = self._executor.poll(None)
        assert result is not None
        return result


class PipelineRunner:
    """Stage, dispatcher and expert workers over sockets; this thread plays the scheduler."""

    def __init__(self, config: ModelConfig, limits: EngineLimits, engine: ScriptedEngine) -> None:
        self.config = config
        self.limits = limits
        self.epoch = engine.epoch
        self._engine = engine

    def run(self, plan: StepPlan) -> StepResult:
        return self._engine.run(plan)


class ScriptedEngine:
    """Takes the place of EngineCore in a real engine worker: plans come from the test's thread."""

    num_in_flight = 0

    def __init__(self) -> None:
        self.epoch = 0
        self.ready = threading.Event()
        self.transport: Transport | None = None
        self._plans: deque[StepPlan] = deque()
        self._results: queue.Queue[StepResult] = queue.Queue()

    def run(self, plan: StepPlan) -> StepResult:
        """From the test's thread: one plan to its result."""
        assert self.transport is not None
        self._plans.append(plan)
        self.transport.wake()
        return self._results.get(timeout=60)

    def reset(self, epoch: int, *, keep_cache: bool = False) -> None:
        self.epoch = epoch
        self.ready.set()

    def schedule(self) -> StepPlan | None:
        return self._plans.popleft() if self._plans else None

    def apply(self, result: StepResult) -> tuple[Token, ...]:
        self._results.put(result)
        return ()

    def load(self) -> EngineLoad:
        return EngineLoad()

    def admit(self, admit: Admit) -> None:
        raise AssertionError(f"a scripted engine admits nothing, least of all {admit}")

    def abort(self, abort: Abort) -> None:
        raise AssertionError(f"a scripted engine aborts nothing, least of all {abort}")


def limits_of(config: ModelConfig) -> EngineLimits:
    """LIMITS with the model's own needs."""
    kinds = {config.cache_shape(i).kind for i in range(config.num_layers)}
    return replace(
        LIMITS,
        num_state_slots=LIMITS.max_num_seqs if "state" in kinds else 0,
        reprefill_length=config.reprefill_length,
    )


def random_placement(config: ModelConfig, num_shards: int, rng: random.Random) -> Placement | None:
    """Every expert on one or two random shards; None for a model without routed experts."""
    if not any(config.is_moe_layer(i) for i in range(config.num_layers)):
        return None
    shards = range(num_shards)
    return Placement(
        num_shards=num_shards,
        shards=tuple(
            tuple(rng.sample(shards, rng.choice([1, 1, 2]))) for _ in range(config.num_experts)
        ),
    )


def random_stages(num_layers: int, num_stages: int, rng: random.Random) -> list[tuple[int, int]]:
    """Contiguous layer ranges, cut anywhere."""
    cuts = sorted(rng.sample(range(1, num_layers), num_stages - 1))
    return list(zip([0, *cuts], [*cuts, num_layers], strict=True))


@contextmanager
def pipeline(
    folder: Path,
    *,
    stages: int = 2,
    shards: int = 3,
    seed: int = 0,
    placement: Placement | None = None,
    dtype: str = "float32",
    quantization: str = "none",
) -> Iterator[PipelineRunner]:
    """A running group of threads: random stage cuts, random expert placement, either dispatch."""
    rng = random.Random(f"{folder.name} {stages} {shards} {seed}")
    config = load_config(folder)
    limits = limits_of(config)
    spec = GroupSpec(
        model_path=str(folder),
        dtype=dtype,
        executor="pipeline",
        dispatch=rng.choice(["actor", "direct"]),
        stage_layers=tuple(random_stages(config.num_layers, stages, rng)),
        placement=placement or random_placement(config, shards, rng),
        limits=limits,
        threads=1,
        secret="parity",
        quantization=quantization,
    )
    engine = ScriptedEngine()
    launcher = ThreadLauncher(lambda worker, transport: _make(worker, transport, engine))
    group = ModelGroup(spec, launcher, SocketTransport(INGRESS, spec.secret))
    group.start(timeout=120)
    try:
        assert engine.ready.wait(timeout=60), "no epoch begins"
        yield PipelineRunner(config, limits, engine)
    finally:
        group.stop()


def _make(spec: WorkerSpec, transport: Transport, engine: ScriptedEngine) -> RunsForever:
    if spec.role is not Role.ENGINE:
        return make_worker(spec, transport)
    engine.transport = transport
    executor = PipelineExecutor(transport, max_in_flight=1)
    return EngineWorker(spec, transport, lambda limits: engine, executor)  # type: ignore[arg-type, return-value]
