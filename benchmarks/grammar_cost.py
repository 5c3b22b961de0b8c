"""What keeping answers to a grammar costs: decode steps of a mid model with and without masks.

.venv/bin/python -m benchmarks.grammar_cost --families dbrx phimoe jamba --batch 16

The same prompts in turn, free and held to a JSON schema; the weights are random, so what is said
makes no sense, but every answer goes on inside of the schema's strings to its last token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.contestants import Engine
from benchmarks.mid_checkpoints import MID, write_random
from deploy.structured_outputs import schema_grammar
from shards.grammar import Constraint, Mask
from shards.vocabulary import Vocabulary

MOST = 0.05
"""The goal: share of a step."""
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 400},
        "tags": {"type": "array", "items": {"type": "string"}},
        "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


def vocabulary(size: int) -> Vocabulary:
    """All bytes, then different words of two to nine letters, some with a space before them."""
    generator = torch.Generator().manual_seed(3)
    words: dict[bytes, None] = {bytes([byte]): None for byte in range(256)}
    while len(words) < size - 1:
        length = int(torch.randint(2, 10, (), generator=generator))
        letters = bytes((torch.randint(26, (length,), generator=generator) + 97).tolist())
        words[b" " * (len(words) % 2) + letters] = None
    return Vocabulary.of([*words, b"<end>"], [size - 1], (size - 1,))


@contextmanager
def timed_masks() -> Iterator[list[float]]:
    """Seconds of every mask that is made meanwhile."""
    seconds: list[float] = []
    mask = Constraint.mask

    def timed(self: Constraint, size: int) -> Mask:
        began = time.perf_counter()
        try:
            return mask(self, size)
        finally:
            seconds.append(time.perf_counter() - began)

    Constraint.mask = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Constraint.mask = mask  # type: ignore[method-assign]


def measure(family: str, args: argparse.Namespace) -> None:
    """Both ways in turn, `args.rounds` times."""
    raw = {**MID[family], **({"vocab_size": args.vocab_size} if args.vocab_size else {})}
    grammar = schema_grammar(_SCHEMA)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(300, 4000, (args.batch, 32), generator=generator).tolist()
    steps: dict[str | None, list[float]] = {None: [], grammar: []}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_random(raw, Path(folder), 0)
        words = vocabulary(int(raw["vocab_size"]))
        engine = Engine(Path(folder), args.batch, prefix_caching=False, vocabulary=words)
        for held in steps:
            engine.run(prompts, 4, grammar=held)
        for _ in range(args.rounds):
            for held, seconds in steps.items():
                with timed_masks() as masks:
                    timed = engine.run(prompts, args.tokens, grammar=held)
                assert {len(each) for each in timed.tokens} == {args.tokens}, "an early end"
                seconds.append(timed.decode / (timed.decoded / args.batch))
                if held is not None:
                    shares.append(sum(masks) / (timed.prefill + timed.decode))
    free, constrained = (statistics.median(seconds) for seconds in steps.values())
    print(
        f"| {family} | {raw['vocab_size']} | {free * 1e3:.1f} | {constrained * 1e3:.1f} "
        f"| {constrained / free - 1:+.1%} | {statistics.median(shares):.1%} |",
        flush=True,
    )


def main() -> None:
    """One line per family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=sorted(MID), default=sorted(MID))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, help="instead of the family's mid one")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| family | vocabulary | free, ms a step | held, ms a step | more | in masks alone |")
    print("|---|---|---|---|---|---|")
    for family in args.families:
        measure(family, args)
    print(f"goal: masks {MOST:.0%} of a step or less")


if __name__ == "__main__":
    main()
