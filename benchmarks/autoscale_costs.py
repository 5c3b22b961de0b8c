"""What steps and a start really cost on this machine: the figures that simulations are fed with.

python -m benchmarks.autoscale_costs FOLDER --threads 2 --output benchmarks/autoscale_costs.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

_BATCHES = (1, 2, 4, 8, 16, 24, 32)
_PROMPTS = (128, 512, 1024, 2048)
_TOKENS = 9
_ROUNDS = 3


def measure(model: Path, threads: int) -> dict[str, Any]:
    """Steps of the real engine in this process, and a replica on a real Ray and Serve."""
    # Ray first: it reads its settings when it is imported, which the engine need not do.
    ray_s, startup_s = _start_times(model, threads)
    decode, prefill = _step_times(model, threads)
    base_s, decode_s, prefill_s, error = _fit(decode, prefill)
    return {
        "model": model.name,
        "startup_s": round(startup_s, 2),
        "base_s": base_s,
        "decode_s": decode_s,
        "prefill_s": prefill_s,
        "seats": max(_BATCHES),
        "chunk_tokens": 512,
        "kv_blocks": 4096,
        "block_size": 16,
        "measured": {
            "decode_step_s": decode,
            "prompt_s": prefill,
            "largest_error_of_the_fit": round(error, 3),
            "ray_and_serve_s": round(ray_s, 2),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads",
            "load": round(os.getloadavg()[0], 1),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        },
    }


def _step_times(model: Path, threads: int) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of a decode step by its batch, and of a prompt by its length."""
    import torch

    from benchmarks.contestants import Engine
    from benchmarks.engine import prompts_of

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    engine = Engine(model, max(_BATCHES))
    decode, prefill = {}, {}
    for batch in _BATCHES:
        runs = [engine.run(prompts_of(batch, 64), _TOKENS) for _ in range(_ROUNDS)]
        decode[batch] = statistics.median(run.decode / (run.decoded / batch) for run in runs)
    for length in _PROMPTS:
        runs = [engine.run(prompts_of(1, length), 2) for _ in range(_ROUNDS)]
        prefill[length] = statistics.median(run.prefill for run in runs)
    return decode, prefill


def _fit(decode: dict[int, float], prefill: dict[int, float]) -> tuple[float, float, float, float]:
    """`base + decode * batch + prefill * tokens` with the least relative errors; the largest."""
    rows = [[1.0, batch, 0.0] for batch in decode] + [[1.0, 0.0, tokens] for tokens in prefill]
    seconds = np.array([*decode.values(), *prefill.values()])
    scaled = np.array(rows) / seconds[:, None]
    found, *_ = np.linalg.lstsq(scaled, np.ones(len(rows)), rcond=None)
    base_s, decode_s, prefill_s = (float(f"{max(0.0, value):.3g}") for value in found)
    return base_s, decode_s, prefill_s, float(abs(scaled @ found - 1).max())


def _start_times(model: Path, threads: int) -> tuple[float, float]:
    """Seconds of Ray with Serve, and of a replica on it from the call until it has answered."""
    began = time.monotonic()
    from deploy.config import parse_args
    from deploy.local_ray import ray_session
    from deploy.reservation import num_cpus
    from deploy.resolve import resolve

    resolved = resolve(parse_args({"model": str(model), "threads": threads}))
    with ray_session(num_cpus(resolved)):
        from ray import serve

        from deploy.app import application

        serve.start(proxy_location="Disabled")
        there = time.monotonic()
        handle = serve.run(application(resolved), name="measured", route_prefix=None)
        handle.completions.remote({"prompt": [7, 8, 9], "max_tokens": 1}).result()
        return there - began, time.monotonic() - there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    costs = json.dumps(measure(args.model, args.threads), indent=2)
    args.output.write_text(costs + "\n", encoding="utf-8")
    print(costs)


if __name__ == "__main__":
    main()
