"""Whether a stream is what it would have been without any fault, token by token, bit by bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tests.groups import Answer


class Verdict(StrEnum):
    """How a stream ended."""

    RIGHT = "right"
    FAILED = "failed"
    """It raised an error."""
    TRUNCATED = "truncated"
    """What came is right, but not all of it, or its end never came."""
    CHANGED = "changed"
    """A token, a logprob or the reason of its end is another one."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and, unless all is right, what is wrong."""

    verdict: Verdict
    why: str = ""


def judge(expected: Answer, got: Answer, error: str = "") -> Judgement:
    """Compare a stream with the undisturbed answer; a change outweighs an error."""
    for position, (wanted, seen) in enumerate(zip(_rows(expected), _rows(got), strict=False)):
        if wanted != seen:
            return Judgement(Verdict.CHANGED, f"position {position}: {seen} instead of {wanted}")
    extra = len(got.token_ids) - len(expected.token_ids)
    if extra > 0:
        return Judgement(Verdict.CHANGED, f"{extra} tokens after the end")
    if error:
        return Judgement(Verdict.FAILED, error)
    if extra < 0:
        of = f"{len(got.token_ids)} of {len(expected.token_ids)} tokens"
        return Judgement(Verdict.TRUNCATED, of)
    if got.finish != expected.finish:
        return Judgement(Verdict.CHANGED, f"ended by {got.finish}, not {expected.finish}")
    return Judgement(Verdict.RIGHT)


def count(judgements: Iterable[Judgement]) -> dict[str, int]:
    """How many streams got each verdict."""
    counts = {str(verdict): 0 for verdict in Verdict}
    for judgement in judgements:
        counts[judgement.verdict] += 1
    return counts


def _rows(answer: Answer) -> list[tuple[object, ...]]:
    """Per token everything that belongs to it."""
    return list(zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True))
