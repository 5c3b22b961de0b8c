"""Decode speed of the two dispatch homes and of one process, side by side in one run.

.venv/bin/python -m benchmarks.dispatch_homes --model nano-jamba --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time
from contextlib import ExitStack
from typing import Any

from deploy.demo import NANO_MODELS
from router.step import SamplingParams
from shards.group import ModelGroup
from tests.groups import Answer, ask_all, running_group

SETUPS: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "2x2 actor": {"stages": 2, "expert_shards": 2, "dispatch": "actor"},
    "2x2 direct": {"stages": 2, "expert_shards": 2, "dispatch": "direct"},
}


async def measure(group: ModelGroup, batch: int, tokens: int) -> tuple[float, list[Answer]]:
    """Seconds for `batch` sequences of `tokens` tokens each, and what they said."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=0)
    prompts = [tuple(range(5, 13 + i % 4)) for i in range(batch)]
    begin = time.perf_counter()
    answers = await ask_all(group, prompts, sampling)
    return time.perf_counter() - begin, answers


async def compare(groups: dict[str, ModelGroup], batch: int, tokens: int, rounds: int) -> None:
    """Alternate the set-ups so that a loaded moment falls on all of them; print medians."""
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    for turn in range(rounds + 1):
        said = []
        for name, group in groups.items():
            took, answers = await measure(group, batch, tokens)
            said.append(answers)
            if turn:
                seconds[name].append(took)
        assert all(answers == said[0] for answers in said), "the bits must not depend on topology"
    base = statistics.median(seconds["local"])
    for name, values in seconds.items():
        median = statistics.median(values)
        rate, step = batch * tokens / median, 1000 * median / tokens
        print(f"| {batch} | {name} | {rate:.0f} | {step:.1f} | {base / median:.2f} |")


def main() -> None:
    """Parse arguments, start the three set-ups as subprocesses, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano-jamba", help=f"folder or {', '.join(NANO_MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{options.model}, {os.cpu_count()} cores, {platform.processor()}, load {load:.1f}")
    print("| sequences | set-up | tokens/s | ms per step | of local |\n|---|---|---|---|---|")
    with ExitStack() as stack:
        groups = {
            name: stack.enter_context(running_group(options.model, processes=True, **setup))
            for name, setup in SETUPS.items()
        }
        for batch in (1, 8):
            asyncio.run(compare(groups, batch, options.tokens, options.rounds))


if __name__ == "__main__":
    main()
