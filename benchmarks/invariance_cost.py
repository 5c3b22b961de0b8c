"""What it costs that no bit depends on the batch, against the fastest of our own kernels.

Every C function is there in several orders of summation: AMX tiles, vectors of 16, vectors of 8.
Layers call them one by one here, so that each is seen. A server that did not care for bits would
take for each function, product shape and batch whichever is fastest there. The same work is run
with each, in turn, and the time inside each function is taken; the cost is what choosing freely
would save of a whole step. "Seen" is the share of our step that passes inside the functions.

.venv/bin/python -m benchmarks.invariance_cost --families dbrx phimoe jamba --batches 1 8 32
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.contestants import Engine
from benchmarks.engine import load_line, prompts_of
from benchmarks.kernel_clock import apart, timed_kernels
from benchmarks.mid_checkpoints import MID, write_checkpoint
from models.kernels.variants import supported_variants

GOALS = {"dbrx": 0.02, "phimoe": 0.02, "jamba": 0.05}

Seconds = dict[str, dict[str, float]]
"""By variant and C function, or "step" for all of a run."""


class Work:
    """Prefill or decode of one batch: what it takes with each variant."""

    def __init__(self, engine: Engine, batch: int, args: argparse.Namespace) -> None:
        self._engine = engine
        self._prompts = prompts_of(batch, args.prompt)
        self._tokens = args.tokens

    def run(self, variant: str) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of the prefill and of the decode, by function."""
        with timed_kernels(variant) as clock, apart():
            prefill: dict[str, float] = {}

            def on_prefilled() -> None:
                prefill.update(clock.seconds)
                clock.clear()

            self._engine.run(self._prompts, 1)
            clock.clear()
            timed = self._engine.run(self._prompts, self._tokens, on_prefilled=on_prefilled)
            decode = dict(clock.seconds)
        return {**prefill, "step": timed.prefill}, {**decode, "step": timed.decode}


def medians(runs: dict[str, list[dict[str, float]]]) -> Seconds:
    """By variant and function, over the rounds."""
    return {
        variant: {name: statistics.median(run[name] for run in taken) for name in taken[0]}
        for variant, taken in runs.items()
    }


def cost(seconds: Seconds, ours: str) -> tuple[float, dict[str, str]]:
    """The share of our step that choosing freely would save, and where another variant wins."""
    saved, winners = 0.0, {}
    for name, mine in seconds[ours].items():
        best = min(seconds, key=lambda variant: seconds[variant][name])
        if name != "step" and best != ours:
            saved += mine - seconds[best][name]
            winners[name] = f"{best} {seconds[best][name] / mine:.2f}"
    return saved / seconds[ours]["step"], winners


def compare(family: str, args: argparse.Namespace) -> None:
    """Two lines for each batch."""
    names = [variant.name for variant in supported_variants()]
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint("mid", family, Path(scratch))
        engine = Engine(Path(scratch), max(args.batches), max_batched_tokens=2048)
    for batch in args.batches:
        work = Work(engine, batch, args)
        runs: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
        for _ in range(args.rounds):
            for name in names:
                for phase, taken in zip(("prefill", "decode"), work.run(name), strict=True):
                    runs[phase][name].append(taken)
        for phase, by_variant in runs.items():
            seconds = medians(by_variant)
            share, winners = cost(seconds, names[0])
            ours = seconds[names[0]]
            seen = sum(ours.values()) / ours["step"] - 1
            verdict = "met" if share <= GOALS[family] else "MISSED"
            why = "; ".join(f"{name}: {better}" for name, better in winners.items())
            print(
                f"{family:7} {batch:5}  {phase:8} {share:6.1%}  {verdict:6}  {seen:5.0%}  {why}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(MID), choices=list(MID))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(f"{args.threads} threads, {load_line()}; goals: 2 %, Jamba 5 %")
    print(
        "family  batch  phase     cost  goal     seen   where another is faster: share of our time"
    )
    for family in args.families:
        compare(family, args)


if __name__ == "__main__":
    main()
