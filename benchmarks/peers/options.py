"""What is measured: the command line of the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer_environments import DEFAULT_FOLDER
from benchmarks.peers.processes import ENGINES

FAMILIES = ("dbrx", "phimoe", "jamba")
MANY_PROMPT_TOKENS = 4096
FEWEST_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, checked."""

    engines: tuple[str, ...]
    families: tuple[str, ...]
    size: str
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: int
    rounds: int
    threads: int
    most_prompt_tokens: int
    skip_server: bool
    skip_rightness: bool
    environments: Path
    checkpoints: Path
    output: Path | None
    log: Path

    def rounds_of(self, prompt_tokens: int) -> int:
        """Fewer for batches of many prompt tokens, some of which take a minute per engine."""
        if prompt_tokens <= MANY_PROMPT_TOKENS:
            return self.rounds
        return min(self.rounds, FEWEST_ROUNDS)


def parse_options(description: str | None) -> Options:
    """From sys.argv; exits with 2 and a sentence on a wrong value."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--engines", type=_one_of(ENGINES), default=ENGINES)
    parser.add_argument("--families", type=_one_of(FAMILIES), default=FAMILIES)
    parser.add_argument("--size", choices=("tiny", "mid"), default="mid")
    parser.add_argument("--batches", type=_numbers, default=(1, 8, 32))
    parser.add_argument("--prompts", type=_numbers, default=(128,), help="tokens per prompt")
    parser.add_argument("--tokens", type=int, default=33, help="answered per prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--most-prompt-tokens",
        type=int,
        default=16384,
        help="batches with more prompt tokens than this are left out, and named",
    )
    parser.add_argument("--skip-server", action="store_true")
    parser.add_argument("--skip-rightness", action="store_true", help="all count as unchecked")
    parser.add_argument(
        "--environments", type=Path, default=DEFAULT_FOLDER, help="made by peer_environments"
    )
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER / "checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--log", type=Path, default=DEFAULT_FOLDER / "log")
    return Options(**vars(parser.parse_args()))


def _one_of(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if not set(given) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: allowed are {','.join(allowed)}")
        return given

    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
