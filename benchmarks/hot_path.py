"""What a decode step costs around the kernels: tiny models, where the weights weigh nothing.

Two models of one family that differ in their number of layers give the time per layer; what is
left of a step is planning, metadata, embedding, head and sampling.

.venv/bin/python -m benchmarks.hot_path --families dbrx phimoe jamba --threads 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import Engine
from benchmarks.kernel_clock import timed_kernels
from benchmarks.mid_checkpoints import MID, write_random

MOST_MICROSECONDS = 60.0
"""The goal for one layer at batch 1, outside kernels."""
LAYERS = (8, 16)

TINY: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 256, "n_heads": 8, "vocab_size": 4096},
    "phimoe": {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "vocab_size": 4096,
    },
    "jamba": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "vocab_size": 4096,
    },
}
_TINY_DBRX_FFN = {**MID["dbrx"]["ffn_config"], "ffn_hidden_size": 128}


def tiny_config(family: str, num_layers: int) -> dict[str, Any]:
    """A config.json of 13 to 18 million parameters at 8 layers."""
    raw = {**MID[family], **TINY[family]}
    if family == "dbrx":
        return {**raw, "n_layers": num_layers, "ffn_config": _TINY_DBRX_FFN}
    return {**raw, "num_hidden_layers": num_layers}


@dataclass
class StepTimes:
    """Microseconds of one decode step in all, of its planning and in kernels; C calls of a step."""

    total: list[float] = field(default_factory=list)
    planning: list[float] = field(default_factory=list)
    kernels: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Over the rounds."""
        values: list[float] = getattr(self, name)
        return statistics.median(values)


def measure(folders: Sequence[Path], batch: int, args: argparse.Namespace) -> list[StepTimes]:
    """All models in turn, `args.rounds` times; kernels are timed in runs of their own."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, 4000, (batch, 32), generator=generator).tolist()
    times = [StepTimes() for _ in folders]
    for step, engine in each_round(folders, times, batch, args.rounds):
        timed = engine.run(prompts, args.tokens)
        step.total.append(timed.decode / (timed.decoded / batch) * 1e6)
        step.planning.append(statistics.median(timed.planning) * 1e6)
    with timed_kernels() as clock:
        for step, engine in each_round(folders, times, batch, args.rounds):
            clock.clear()
            engine.run(prompts, 1)  # what comes before the first decode step
            prefill = clock.seconds.total(), clock.calls.total()
            clock.clear()
            engine.run(prompts, args.tokens)
            decode = clock.seconds.total(), clock.calls.total()
            seconds, calls = (
                (d - p) / (args.tokens - 1) for d, p in zip(decode, prefill, strict=True)
            )
            step.kernels.append(seconds * 1e6)
            step.calls.append(calls)
    return times


def each_round(
    folders: Sequence[Path], times: Sequence[StepTimes], batch: int, rounds: int
) -> Iterator[tuple[StepTimes, Engine]]:
    """Every model's engine, warm, once in each round."""
    engines = [Engine(folder, batch) for folder in folders]
    for engine in engines:
        engine.run([[5] * 32] * batch, 8)
    for _ in range(rounds):
        yield from zip(times, engines, strict=True)


def report(family: str, args: argparse.Namespace) -> None:
    """One family's line for each batch."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(num_layers) for num_layers in LAYERS]
        for folder, num_layers in zip(folders, LAYERS, strict=True):
            write_random(tiny_config(family, num_layers), folder)
        for batch in args.batches:
            small, large = measure(folders, batch, args)
            added = LAYERS[1] - LAYERS[0]
            layer, kernels, calls = (
                (large.median(name) - small.median(name)) / added
                for name in ("total", "kernels", "calls")
            )
            total, outside = small.median("total"), layer - kernels
            verdict = "reached" if outside <= MOST_MICROSECONDS else "MISSED"
            print(
                f"{family:7} {batch:5}  {1e6 * batch / total:8.0f}  {layer:6.1f}  "
                f"{kernels:7.1f}  {outside:7.1f}  {calls:5.1f}  {total - LAYERS[0] * layer:6.1f}  "
                f"{small.median('kernels') - LAYERS[0] * kernels:7.1f}  "
                f"{small.median('planning'):8.1f}  {verdict if batch == 1 else ''}",
                flush=True,
            )


def main() -> None:
    """The table; microseconds but for tokens/s (at 8 layers) and calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(TINY), choices=list(TINY))
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"bfloat16, {args.threads} threads; load average {os.getloadavg()[0]:.1f}")
    print(f"goal: at most {MOST_MICROSECONDS:.0f} us of a layer outside kernels at batch 1")
    print("                          --------- per layer ---------  ---- rest of a step ----")
    print("family  batch     tok/s   total  kernels  outside  calls   total  kernels  planning")
    for family in args.families:
        report(family, args)


if __name__ == "__main__":
    main()
