"""One sequence that grows long: the engine's steps, timed one by one, and what memory they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.registry import load_config
from router.engine import EngineCore
from router.limits import EngineLimits
from router.step import Admit, SamplingParams, StepPlan
from shards.cache_bytes import block_bytes
from shards.local_executor import LocalExecutor

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill step: tokens start..start + tokens - 1 of the prompt.

    `peak_bytes` is the most memory that the process held meanwhile beyond what it held when loaded.
    """

    start: int
    tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Decode:
    """The median step of one token with `context` tokens in front of it."""

    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Series:
    """What was measured of one model."""

    family: str
    length: int
    bytes_per_token: float
    """Of keys and values."""
    chunks: list[Chunk]
    decodes: list[Decode]


class LongRun:
    """A loaded model that serves one sequence at a time."""

    def __init__(self, folder: Path, max_tokens: int, chunk: int) -> None:
        config = load_config(folder)
        layers = range(config.num_layers)
        kinds = {config.cache_shape(i).kind for i in layers}
        self._limits = EngineLimits(
            block_size=BLOCK_SIZE,
            num_blocks=2 * (max_tokens // BLOCK_SIZE + 1),
            num_state_slots=1 if "state" in kinds else 0,
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            max_model_len=max_tokens + 1,
            reprefill_length=config.reprefill_length,
            prefix_caching=True,
            num_snapshots=32,
        )
        self.bytes_per_token = block_bytes(config, layers, BLOCK_SIZE, 2) / BLOCK_SIZE
        self._executor = LocalExecutor(config, folder, torch.bfloat16, self._limits)
        self._epoch, self._next_id = 0, 0
        self.forget()
        self._loaded_bytes = resident("VmRSS")

    def forget(self) -> None:
        """No prefix is known any more."""
        self._epoch += 1
        self._core = EngineCore(self._limits)
        self._core.reset(self._epoch)

    def chunks(self, prompt: Sequence[int], num_tokens: int) -> list[Chunk]:
        """Prefill a prompt and generate some tokens; → its prefill steps."""
        found = []
        for plan, seconds, peak in self._steps(prompt, num_tokens):
            (scheduled,) = plan.scheduled
            if scheduled.start < len(prompt):
                held = peak - self._loaded_bytes
                found.append(Chunk(scheduled.start, scheduled.num_tokens, seconds, held))
        return found

    def decode(self, prompt: Sequence[int], num_tokens: int) -> Decode:
        """Generate behind a prompt, as much as possible of which is cached."""
        seconds = [
            seconds
            for plan, seconds, _ in self._steps(prompt, num_tokens)
            if plan.scheduled[0].start >= len(prompt)
        ]
        return Decode(len(prompt), statistics.median(seconds))

    def _steps(
        self, prompt: Sequence[int], num_tokens: int
    ) -> Iterator[tuple[StepPlan, float, int]]:
        """Every step: plan, seconds with planning, peak memory."""
        self._next_id += 1
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        admit = Admit(
            seq_id=self._next_id, epoch=self._epoch, prompt=tuple(prompt), sampling=sampling
        )
        assert self._core.admit(admit) is None
        while self._core.has_work:
            forget_peak()
            begin = time.perf_counter()
            plan = self._core.schedule()
            assert plan is not None
            self._executor.submit(plan)
            result = self._executor.poll(None)
            assert result is not None
            self._core.apply(result)
            seconds = time.perf_counter() - begin
            if plan.scheduled:
                yield plan, seconds, resident("VmHWM")


def resident(field: str) -> int:
    """Bytes of physical memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """VmHWM counts from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def line_through(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: (value at 0, slope, standard deviation of what is left)."""
    slope, base = statistics.linear_regression(xs, ys)
    rest = [y - base - slope * x for x, y in zip(xs, ys, strict=True)]
    return base, slope, statistics.pstdev(rest)
