"""The engine beside Transformers' `generate` and continuous batching, in one run, in one process,
on the same threads.

.venv/bin/python -m benchmarks.engine --families dbrx phimoe jamba --threads 2 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import (
    ContinuousBatching,
    Engine,
    Generate,
    PlainEngine,
    Timed,
)
from benchmarks.mid_checkpoints import MID, write_checkpoint
from benchmarks.plain_operators import print_costs_of_products

MOST_PLANNING_MS = 0.3
"""The goal for planning one step of 32 sequences."""
MOST_CACHED = 0.1
"""The goal for the first token of a cached prompt, as a share of the cold one's time."""


def prompts_of(batch: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of one length, so that Transformers needs no padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 30000, (batch, length), generator=generator).tolist()


def load_line() -> str:
    """How busy the machine is, this process included."""
    return "load average " + " ".join(f"{load:.1f}" for load in os.getloadavg())


def compare(family: str, args: argparse.Namespace) -> None:
    """One family's tables."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_checkpoint("mid", family, folder)
        print(f"\n{family}: {parameters / 1e9:.2f} B parameters, bfloat16; {load_line()}")
        engine, generate = Engine(folder, max(args.batches)), Generate(folder)
        contestants = [engine, PlainEngine(engine), generate, ContinuousBatching(generate.model)]
        print(f"prompts of {args.prompt} tokens, answers of {args.tokens}", end="; ")
        print(f"medians of {args.rounds} rounds in turn")
        print(f"{'batch':5}  {'':32}  prefill tok/s  decode tok/s  engine's decode is")
        for batch in args.batches:
            measure(batch, contestants, args)
        del generate, contestants
        first_token(engine, args)
    print(f"{family} took {time.perf_counter() - begin:.0f} s; {load_line()}", flush=True)


def measure(batch: int, contestants: Sequence[Any], args: argparse.Namespace) -> None:
    """All contestants in turn, `args.rounds` times; one row each."""
    prompts = prompts_of(batch, args.prompt)
    runs: dict[str, list[Timed]] = {contestant.name: [] for contestant in contestants}
    for _ in range(args.rounds):
        for contestant in contestants:
            if not getattr(contestant, "refusal", None):
                runs[contestant.name].append(contestant.run(prompts, args.tokens))
    ours = decode_rate(runs[Engine.name])
    for contestant in contestants:
        refusal = getattr(contestant, "refusal", None)
        if refusal:
            print(f"{batch:5}  {contestant.name:32}  refused: {refusal}")
            continue
        taken = runs[contestant.name]
        prefill = batch * args.prompt / statistics.median(timed.prefill for timed in taken)
        decode = decode_rate(taken)
        ratio = "" if contestant is contestants[0] else f"{ours / decode:17.2f}x"
        print(f"{batch:5}  {contestant.name:32}  {prefill:13.1f}  {decode:12.1f}  {ratio}")
    print_planning(batch, [seconds for timed in runs[Engine.name] for seconds in timed.planning])


def decode_rate(runs: Sequence[Timed]) -> float:
    """Median of tokens per second after every sequence's first."""
    return statistics.median(timed.decoded / timed.decode for timed in runs)


def print_planning(batch: int, seconds: Sequence[float]) -> None:
    """The scheduler's own time per step, and whether the goal is met where it is set."""
    median, high = statistics.median(seconds) * 1e3, statistics.quantiles(seconds, n=20)[-1] * 1e3
    verdict = ""
    if batch == 32:
        verdict = (
            f"; goal {MOST_PLANNING_MS} ms: {'met' if median <= MOST_PLANNING_MS else 'missed'}"
        )
    print(f"{batch:5}  planning a step takes {median:.3f} ms (95 %: {high:.3f} ms){verdict}")


def first_token(engine: Engine, args: argparse.Namespace) -> None:
    """Time to the first token of a long prompt, cold and with all but its end cached."""
    (prompt,) = prompts_of(1, args.prefix, seed=9)
    cold, warm = [], []
    for _ in range(args.prefix_rounds):
        cold.append(engine.run([prompt], 1).prefill)
        for turn in range(3):
            ending = range(5 + 8 * turn, 13 + 8 * turn)
            warm.append(engine.run([[*prompt[:-8], *ending]], 1, cold=False).prefill)
    share = statistics.median(warm) / statistics.median(cold)
    print(
        f"first token of {args.prefix} tokens: cold {statistics.median(cold):.2f} s "
        f"({len(cold)} rounds), cached {statistics.median(warm):.3f} s ({len(warm)} rounds): "
        f"{share:.4f} of it; goal {MOST_CACHED}: {'met' if share <= MOST_CACHED else 'missed'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(MID), choices=list(MID))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--prefix", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefix-rounds", type=int, default=1, help="cold ones; three cached each")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch", end=" ")
    print(f"{torch.__version__}; {load_line()}")
    for family in args.families:
        compare(family, args)
    print_costs_of_products()


if __name__ == "__main__":
    main()
