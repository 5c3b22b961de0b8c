"""int8 experts beside bfloat16 ones: the expert FFN alone with cold weights, and whole engines.

.venv/bin/python -m benchmarks.int8 --experts 1024x1600 --threads 1
.venv/bin/python -m benchmarks.int8 --engine phimoe --threads 2 --batches 1 32
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.contestants import Engine, Timed
from benchmarks.engine import decode_rate, load_line, prompts_of
from benchmarks.kernel_clock import apart
from benchmarks.mid_checkpoints import write_checkpoint
from models.interface import ExpertWeights
from models.kernels.native import native_kernels
from models.registry import load_config
from shards.expert_bank import ExpertBank
from shards.quantization import quantize_rows

# More than any cache that is likely to be this process's own.
_COLD_BYTES = 1 << 30
_EXPERTS = 4
"""Of one call, with equally many rows."""

Groups = list[tuple[ExpertWeights, int]]


def cold_experts(width: int, hidden: int, quantization: str) -> list[ExpertWeights]:
    """As many experts as fill the caches several times over; values are alike in all."""
    matrices = [torch.randn(hidden, width) / width**0.5 for _ in range(2)]
    matrices.append(torch.randn(width, hidden) / hidden**0.5)
    scales: list[Tensor | None] = [None] * 3
    if quantization == "int8":
        for i, matrix in enumerate(matrices):
            matrices[i], scales[i] = quantize_rows(matrix)
    else:
        matrices = [matrix.bfloat16() for matrix in matrices]
    count = _COLD_BYTES // sum(matrix.nbytes for matrix in matrices) // _EXPERTS * _EXPERTS
    return [
        ExpertWeights(*(matrix.clone() for matrix in matrices), *scales)
        for _ in range(max(_EXPERTS, count))
    ]


def print_experts(width: int, hidden: int, all_rows: Sequence[int], seconds: float) -> None:
    """Microseconds of calls of four experts, in turn: medians."""
    native = native_kernels("experts", torch.bfloat16, torch.device("cpu"))
    assert native is not None, "the PyTorch path has no figures to compare"
    pools = {name: cold_experts(width, hidden, name) for name in ("none", "int8")}
    turns = dict.fromkeys(pools, 0)
    print(f"\n{native.name}, width {width}, hidden {hidden}, {torch.get_num_threads()} threads")
    print("| rows per expert | bf16, us | int8, us | ratio | int8, GB/s |\n|---|---|---|---|---|")
    for rows in all_rows:
        x = torch.randn(_EXPERTS * rows, width).bfloat16()
        taken: dict[str, list[float]] = {name: [] for name in pools}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, pool in pools.items():
                at = turns[name] = (turns[name] + _EXPERTS) % len(pool)
                groups: Groups = [(weights, rows) for weights in pool[at : at + _EXPERTS]]
                begin = time.perf_counter()
                native.experts(x, groups)
                taken[name].append((time.perf_counter() - begin) * 1e6)
        plain, int8 = (statistics.median(times) for times in taken.values())
        read = _EXPERTS * 3 * width * hidden / int8 / 1e3
        print(
            f"| {rows} | {plain:.0f} | {int8:.0f} | {plain / int8:.2f} | {read:.1f} |", flush=True
        )


@contextmanager
def expert_times() -> Iterator[list[tuple[int, float]]]:
    """Rows and seconds of every call of a bank of experts."""
    calls: list[tuple[int, float]] = []
    forward = ExpertBank.forward

    def timed(
        bank: ExpertBank, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor
    ) -> Tensor:
        begin = time.perf_counter()
        out = forward(bank, layer_idx, pairs, rows)
        calls.append((len(rows), time.perf_counter() - begin))
        return out

    with apart(), patch.object(ExpertBank, "forward", timed):
        yield calls


def print_engines(family: str, batches: Sequence[int], args: argparse.Namespace) -> None:
    """A row per batch and setting; the engines take turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint("mid", family, folder)
        config = load_config(folder)
        engines = {
            name: Engine(folder, max(batches), quantization=name) for name in ("none", "int8")
        }
        print(f"\n{family}, {torch.get_num_threads()} threads; {load_line()}")
        print("| batch | experts | prefill, tok/s | decode, tok/s | step, ms | experts of it, ms |")
        print("|---|---|---|---|---|---|")
        for batch in batches:
            prompts = prompts_of(batch, args.prompt)
            runs: dict[str, list[Timed]] = {name: [] for name in engines}
            spent: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(args.rounds):
                for name, engine in engines.items():
                    runs[name].append(engine.run(prompts, args.tokens))
                    with expert_times() as calls:
                        engine.run(prompts, args.tokens)
                    decoding = [s for rows, s in calls if rows == batch * config.top_k]
                    spent[name].append(sum(decoding) / (args.tokens - 1) * 1e3)
            for name, taken in runs.items():
                prefill = batch * args.prompt / statistics.median(t.prefill for t in taken)
                decode = decode_rate(taken)
                experts = statistics.median(spent[name])
                row = f"{prefill:.0f} | {decode:.1f} | {batch / decode * 1e3:.2f} | {experts:.2f}"
                print(f"| {batch} | {'bf16' if name == 'none' else name} | {row} |", flush=True)


def main() -> None:
    """Parse arguments, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", nargs="*", default=[], metavar="WIDTHxHIDDEN")
    parser.add_argument("--engine", nargs="*", default=[], metavar="FAMILY")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each number of rows")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="generated for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.experts:
        width, hidden = map(int, shape.split("x"))
        with torch.inference_mode():
            print_experts(width, hidden, args.rows, args.seconds)
    for family in args.engine:
        print_engines(family, args.batches, args)


if __name__ == "__main__":
    main()
