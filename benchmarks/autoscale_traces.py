"""Seeded arrivals of requests with lengths as people and programs have them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

DAY_S = 7200.0
"""A day in two hours: against a start of 15 s as steep as a real day against three minutes."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of `prompt` tokens that is answered with `answer` tokens."""

    arrival: float
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Log-normal lengths by their medians and spreads, cut at what is served."""

    prompt: float
    answer: float
    prompt_spread: float = 0.8
    answer_spread: float = 0.8
    longest: int = 6000

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its answer."""
        prompt = round(self.prompt * math.exp(rng.gauss(0, self.prompt_spread)))
        answer = round(self.answer * math.exp(rng.gauss(0, self.answer_spread)))
        return min(max(prompt, 4), self.longest), min(max(answer, 1), 1500)


CHAT = Lengths(prompt=400, answer=130)
"""Conversations: answers are what takes time."""
CODE = Lengths(prompt=1500, answer=15)
"""Completions in an editor, summaries, retrieval: prompts are what takes time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Requests of one kind, at `rate(seconds)` per second."""

    lengths: Lengths
    rate: Callable[[float], float]
    most: float
    """The rate never exceeds it."""


def draw(streams: list[Stream], duration_s: float, seed: int) -> list[Request]:
    """Poisson arrivals of all streams, in order of time."""
    requests = []
    for index, stream in enumerate(streams):
        rng = random.Random(f"{seed} {index}")
        now = rng.expovariate(stream.most)
        while now < duration_s:
            if rng.random() * stream.most < stream.rate(now):
                requests.append(Request(now, *stream.lengths.draw(rng)))
            now += rng.expovariate(stream.most)
    return sorted(requests, key=lambda request: request.arrival)


def _wave(now: float, peak_at: float, sharpness: float) -> float:
    """0..1 over a day, 1 at the hour `peak_at`."""
    angle = 2 * math.pi * (now / DAY_S - peak_at / 24)
    return math.pow((1 + math.cos(angle)) / 2, sharpness)


def diurnal(peak: float, seed: int) -> list[Request]:
    """A day: conversations that peak in the evening, programs that work in the morning."""
    chat = Stream(lengths=CHAT, rate=lambda t: peak * (0.08 + 0.92 * _wave(t, 19, 1.5)), most=peak)
    code = Stream(lengths=CODE, rate=lambda t: peak * (0.04 + 0.96 * _wave(t, 11, 3)), most=peak)
    return draw([chat, code], DAY_S, seed)


def chat_day(peak: float, seed: int) -> list[Request]:
    """A day of conversations alone: all requests are of one kind."""
    rate = 1.4 * peak
    chat = Stream(lengths=CHAT, rate=lambda t: rate * (0.08 + 0.92 * _wave(t, 16, 1.5)), most=rate)
    return draw([chat], DAY_S, seed)


def steps(peak: float, seed: int) -> list[Request]:
    """Conversations that jump to another level, up to six times as high, every ten minutes."""
    levels = (0.2, 1.0, 0.4, 0.8, 0.2, 1.2)
    stream = Stream(
        lengths=CHAT,
        rate=lambda t: peak * levels[int(t // 600) % len(levels)],
        most=1.2 * peak,
    )
    return draw([stream], 3600.0, seed)


def bursts(peak: float, seed: int) -> list[Request]:
    """Quiet conversations, and every now and then two minutes of many long prompts."""
    rng = random.Random(seed)
    begins, now = [], 0.0
    while now < DAY_S / 2:
        now += rng.uniform(240, 720)
        begins.append((now, rng.uniform(0.5, 1.0)))

    def code(t: float) -> float:
        high = sum(height for begin, height in begins if begin <= t < begin + 120)
        return peak * (0.05 + 0.8 * min(1.0, high))

    chat = Stream(lengths=CHAT, rate=lambda t: 0.3 * peak, most=0.3 * peak)
    return draw([chat, Stream(lengths=CODE, rate=code, most=peak)], DAY_S / 2, seed)


TRACES: dict[str, Callable[[float, int], list[Request]]] = {
    "diurnal": diurnal,
    "chat-day": chat_day,
    "steps": steps,
    "bursts": bursts,
}
