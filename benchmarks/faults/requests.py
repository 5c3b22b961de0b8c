"""The load of a run: requests from a seeded distribution, arriving at a Poisson process's times."""

from __future__ import annotations

import random
from dataclasses import dataclass

from router.step import SamplingParams

FIRST_ID = 5
"""Below are the nano tokenizers' special tokens."""
LAST_ID = 480


@dataclass(frozen=True, slots=True)
class Request:
    """One question; whoever asks it, and whatever dies meanwhile, the answer is the same."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


def draw_requests(seed: int, count: int, *, mean_tokens: int = 24) -> list[Request]:
    """`count` different requests: half greedy, half sampled with seeds of their own.

    Lengths are log-normal, as people's are; every third prompt begins with one of four openings,
    so that cached prefixes are used, lost and computed again.
    """
    rng = random.Random(seed)
    openings = [_ids(rng, 48) for _ in range(4)]
    requests = []
    for i in range(count):
        prompt = (*rng.choice(openings), *_ids(rng, 4)) if i % 3 == 0 else _ids(rng, _prompt(rng))
        answer = round(rng.lognormvariate(0.0, 0.6) * mean_tokens / 1.2)
        requests.append(Request(prompt, _sampling(rng, min(max(answer, 4), 4 * mean_tokens))))
    return requests


def arrival_times(seed: int, count: int, rate: float) -> list[float]:
    """Seconds from the start at which `count` requests come, `rate` a second on average."""
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def _ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randint(FIRST_ID, LAST_ID) for _ in range(length))


def _prompt(rng: random.Random) -> int:
    return min(max(round(rng.lognormvariate(0.0, 0.8) * 12), 2), 120)


def _sampling(rng: random.Random, max_tokens: int) -> SamplingParams:
    if rng.random() < 0.5:
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=1)
    penalised = rng.random() < 0.4
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=rng.choice((0.7, 1.0, 1.3)),
        top_p=rng.choice((0.9, 0.95, 1.0)),
        top_k=rng.choice((0, 0, 40)),
        repetition_penalty=1.1 if penalised else 1.0,
        frequency_penalty=0.2 if penalised else 0.0,
        seed=rng.getrandbits(31),
        logprobs=rng.choice((0, 1, 3)),
    )
