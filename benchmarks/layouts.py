"""Whole models in one process and over stages and shards, on the same cores, in the same round."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from router.step import SamplingParams
from shards.group import ModelGroup
from tests.groups import running_group

PROMPT = 128


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a model runs: the group's options, and the compute threads of each worker."""

    options: Mapping[str, Any]
    threads: int


def layouts(cores: int) -> dict[str, Layout]:
    """One process with all the cores, and workers that never have more threads than it has.

    On two cores a stage and two shards are three processes with a thread each: the shards share
    the work of the experts, the stage has one core for the rest, as long as it does not overlap.
    """
    found = {"local": Layout({"executor": "local"}, cores)}
    for stages in (1, 2):
        for dispatch in ("direct", "actor"):
            options = {"stages": stages, "expert_shards": 2, "dispatch": dispatch}
            found[f"{stages}+2 {dispatch}"] = Layout(options, max(1, cores // 2))
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of prefill and decode of a batch, CPU seconds by role while decoding, the tokens."""

    prefill: float
    decode: float
    cpu: dict[str, float]
    token_ids: tuple[tuple[int, ...], ...]


def start(stack: ExitStack, model: str, layout: Layout) -> ModelGroup:
    """A group of worker processes that ends with `stack`."""
    group = running_group(
        model,
        processes=True,
        dtype="bfloat16",
        threads=layout.threads,
        kv_cache_memory="256MiB",
        max_num_seqs=32,
        enable_prefix_caching=False,
        **layout.options,
    )
    return stack.enter_context(group)


async def run(group: ModelGroup, batch: int, tokens: int) -> Run:
    """`batch` prompts of `PROMPT` tokens at once, `tokens` tokens each."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    begin = time.perf_counter()
    firsts: list[float] = []
    cpu: dict[str, float] = {}

    async def ask(idx: int) -> tuple[int, ...]:
        prompt = tuple(5 + (idx * 131 + at * 7) % 1000 for at in range(PROMPT))
        found = []
        async for token in group.generate(prompt, sampling):
            found.append(token.token_id)
            if len(found) == 1:
                firsts.append(time.perf_counter())
                if len(firsts) == batch:
                    cpu.update(cpu_by_role(group))
        return tuple(found)

    answers = await asyncio.gather(*map(ask, range(batch)))
    end = time.perf_counter()
    after = cpu_by_role(group)
    spent = {role: after[role] - cpu[role] for role in after}
    return Run(max(firsts) - begin, end - max(firsts), spent, tuple(answers))


def cpu_by_role(group: ModelGroup) -> dict[str, float]:
    """Processor seconds so far of each role's processes, and of this one as `ingress`."""
    found: dict[str, float] = defaultdict(float)
    found["ingress"] = time.process_time()
    for worker in group.workers():
        # Linux: the clock of another process, by its id.
        found[worker.role] += time.clock_gettime(~worker.pid << 3 | 2)
    return dict(found)


def compare(
    model: str, names: list[str], batches: list[int], tokens: int, rounds: int, cores: int
) -> Iterator[dict[str, Any]]:
    """Take turns within every round, after one that warms up; medians. Asserts equal tokens."""
    with ExitStack() as stack:
        groups = {name: start(stack, model, layouts(cores)[name]) for name in names}
        for batch in batches:
            runs: dict[str, list[Run]] = {name: [] for name in groups}
            for _ in range(rounds + 1):
                for name, group in groups.items():
                    done = asyncio.run(run(group, batch, tokens))
                    runs[name].append(done)
            wanted = runs[names[0]][0].token_ids
            for name, all_runs in runs.items():
                assert all(r.token_ids == wanted for r in all_runs), f"{name}: other tokens"
                timed = all_runs[1:]
                prefill = statistics.median(r.prefill for r in timed)
                decode = statistics.median(r.decode for r in timed)
                steps = rounds * (tokens - 1)
                roles = timed[0].cpu
                yield {
                    "model": model,
                    "batch": batch,
                    "layout": name,
                    "prefill_tokens_per_second": batch * PROMPT / prefill,
                    "decode_tokens_per_second": batch * (tokens - 1) / decode,
                    "step_ms": 1e3 * decode / (tokens - 1),
                    "cpu_ms_per_step": {
                        role: 1e3 * sum(r.cpu[role] for r in timed) / steps for role in roles
                    },
                }
