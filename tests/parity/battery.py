"""What every case asserts: the reference's numbers, and the same bits however they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from router.step import Want
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.session import LOGITS, Session, at_every_split, in_one_batch, one_by_one

ATOL, RTOL = 1e-5, 1e-4

Arrays = dict[str, Tensor]


def assert_close(actual: Tensor, expected: Tensor, what: str = "", atol: float = ATOL) -> None:
    """The numbers contract's tolerance."""
    torch.testing.assert_close(
        actual.float(), expected.float(), atol=atol, rtol=RTOL, msg=lambda m: f"{what}: {m}"
    )


def assert_everywhere(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[Tensor],
    *,
    want: Want = LOGITS,
    stages: int = 2,
    atol: float = ATOL,
) -> list[Arrays]:
    """Logits [n, V] of each sequence equal `expected`, on both executors, in every way.

    Ways: one packed batch of all sequences; the shortest sequence of several tokens prefilled in
    two chunks at every split; the same one token a step. All of them have the local packed
    batch's bits, in every array of `want`. Returns the packed batch's arrays.
    """
    local = Session(LocalRunner(folder))
    packed = in_one_batch(local, sequences, want)
    for i, (arrays, reference) in enumerate(zip(packed, expected, strict=True)):
        what = f"sequence {i} of {len(sequences[i])} tokens"
        assert_close(arrays["logits"], reference, what, atol)
    assert_every_way(local, sequences, packed, want, "local")
    with pipeline(folder, stages=stages) as runner:
        assert_every_way(Session(runner), sequences, packed, want, "pipeline")
    return packed


def assert_every_way(
    session: Session,
    sequences: Sequence[Sequence[int]],
    packed: Sequence[Arrays],
    want: Want = LOGITS,
    where: str = "",
) -> None:
    """The bits of `packed` from batches in another order, every split, and single steps."""
    order = list(range(len(sequences)))[::-1]
    turned = in_one_batch(session, [sequences[i] for i in order], want)
    for i, arrays in zip(order, turned, strict=True):
        assert_same_bits(arrays, packed[i], f"{where}: packed, sequence {i}")
    several = [i for i in order if len(sequences[i]) > 1]
    if not several:
        return
    short = min(several, key=lambda i: len(sequences[i]))
    longest = max(sequences, key=len)
    for cut, arrays in at_every_split(session, sequences[short], want).items():
        assert_same_bits(arrays, packed[short], f"{where}: chunks cut at {cut}")
    for company in (longest, ()):
        stepwise = one_by_one(session, sequences[short], company, want)
        assert_same_bits(stepwise, packed[short], f"{where}: one token a step")


def assert_visible(one: Tensor, other: Tensor, atol: float = 1e-2) -> None:
    """What two references differ in shows far beyond any tolerance, so a case can catch it."""
    assert one.shape == other.shape
    assert float((one - other).abs().max()) > atol


def assert_same_bits(actual: Arrays, expected: Arrays, way: str) -> None:
    """Equality of every bit but the sign of zero, in every array."""
    assert actual.keys() == expected.keys(), way
    for name, array in actual.items():
        different = int((array != expected[name]).sum())
        assert torch.equal(array, expected[name]), f"{way}: {different} values of {name} differ"
