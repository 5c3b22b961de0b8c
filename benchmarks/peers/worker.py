"""The engine's side of the protocol: one JSON object per line on stdin, one answer on stdout.

Imported in the peers' own environments: standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Prompts = list[list[int]]


@dataclass
class Run:
    """When each request's tokens came, in seconds since all were handed over, and the tokens."""

    times: list[list[float]]
    tokens: list[list[int]]


@dataclass
class Scores:
    """Greedy tokens of each prompt and the engine's own log probability of each."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


class Engine(Protocol):
    """What one engine does on one loaded model; `notes` are for the table."""

    notes: list[str]

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        """All prompts at once, greedily, exactly `num_tokens` each."""

    def score(self, prompts: Prompts, num_tokens: int) -> Scores:
        """The same with log probabilities, untimed."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine is to load. `max_tokens` is the longest prompt with its answer."""

    folder: str
    family: str
    dtype: str
    threads: int
    max_batch: int
    max_tokens: int


def serve(load: Callable[[Load], Engine]) -> None:
    """Answer until stdin ends. What the engine prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("operation")
        try:
            if operation == "load":
                engine = load(Load(**request))
            if operation in ("load", "describe"):
                answer: dict[str, Any] = {"notes": engine.notes}
            else:
                answer = _plain(getattr(engine, operation)(**request))
        except Exception as error:  # whatever it is, it stands in the table in place of figures
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")


def _plain(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else asdict(answer)
