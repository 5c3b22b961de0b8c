"""What it costs that experts are in other processes: one exchange, and whole models.

.venv/bin/python -m benchmarks.dispatch --models FOLDER ... --output results.json
.venv/bin/python -m benchmarks.dispatch --parts exchange --seconds 0.5

FOLDER: mid checkpoints of `benchmarks.mid_checkpoints`. Part `exchange`: a message to each of one
or four processes and back, over a bare blocking socket, our transport and dispatcher (both homes,
with experts that echo) and plain Ray actor calls. Part `model`: decode and prefill of one process
against stages and shards on the same cores; asserts equal tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.exchanges import Exchange, bare, conclave, measure, ray_actors
from benchmarks.layouts import compare, layouts
from shards.cores import available_cores

SIZES_KB = (8, 64, 512)
FAN_OUTS = (1, 4)
MAKERS: dict[str, Callable[[int, int], AbstractContextManager[Exchange]]] = {
    "bare": bare,
    "direct": partial(conclave, "direct"),
    "actor": partial(conclave, "actor"),
    "ray": ray_actors,
}


def measure_exchanges(
    kinds: list[str], sizes_kb: list[int], seconds: float
) -> list[dict[str, Any]]:
    """All kinds in turn at each fan-out and size, so that a loaded moment falls on all of them."""
    results: list[dict[str, Any]] = []
    print("| to | KB | by | p50 us | p99 us | CPU us | of bare |\n|---|---|---|---|---|---|---|")
    for fan_out in FAN_OUTS:
        for size in sizes_kb:
            base = None
            for kind in kinds:
                with MAKERS[kind](fan_out, size << 10) as exchange, torch.inference_mode():
                    timing = measure(exchange, seconds)
                base = base or timing.p50
                times = f"{timing.p50:.1f} | {timing.p99:.1f} | {timing.cpu:.1f}"
                print(f"| {fan_out} | {size} | {kind} | {times} | {timing.p50 / base:.2f} |")
                results.append({"fan_out": fan_out, "kb": size, "by": kind, **asdict(timing)})
    return results


def measure_layouts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode and prefill by batch and layout, as a table; `of local` compares tokens per second."""
    results: list[dict[str, Any]] = []
    cores = available_cores()
    for model in options.models:
        print(f"\n{model.name}: {cores} cores, prompts of 128 tokens\n")
        print("| batch | layout | prefill tok/s | of local | decode tok/s | of local | ms a step")
        print("|---|---|---|---|---|---|---")
        for row in compare(
            str(model), options.layouts, options.batches, options.tokens, options.rounds, cores
        ):
            if row["layout"] == options.layouts[0]:
                base = row
            kinds = ("prefill_tokens_per_second", "decode_tokens_per_second")
            speeds = " | ".join(f"{row[k]:.0f} | {row[k] / base[k]:.2f}" for k in kinds)
            cpu = ", ".join(f"{role} {ms:.1f}" for role, ms in row["cpu_ms_per_step"].items())
            print(
                f"| {row['batch']} | {row['layout']} | {speeds} | {row['step_ms']:.1f} (CPU: {cpu})"
            )
            results.append(row)
    return results


def main() -> None:
    """Parse arguments, run the parts, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["exchange", "model"])
    parser.add_argument("--kinds", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES_KB), help="KB")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each exchange")
    parser.add_argument("--models", nargs="*", default=[], type=Path, help="checkpoint folders")
    parser.add_argument("--layouts", nargs="+", default=list(layouts(1)), help="the first is 1.00")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 32])
    parser.add_argument("--tokens", type=int, default=24, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": platform.processor(), "cores": os.cpu_count()}
    results["load"] = os.getloadavg()[0]
    print(f"{results['cores']} cores, load {results['load']:.1f}")
    if "exchange" in options.parts:
        if "ray" in options.kinds:
            import ray

            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        results["exchange"] = measure_exchanges(options.kinds, options.sizes, options.seconds)
    if "model" in options.parts:
        results["model"] = measure_layouts(options)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
