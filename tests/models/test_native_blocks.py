"""Native products of many rows: a row's bits are those it has alone, on both sides of any edge.

Edges: blocks of rows and their division among threads, pairs of row tiles, chunks along K, strips
of outputs, gates beside what they gate.
"""

from __future__ import annotations

import pytest
import torch

from models.interface import ExpertWeights
from tests.models.test_native_linear import NATIVE, expert, int8, randn, same_threads

__all__ = ["same_threads"]

pytestmark = pytest.mark.parametrize("name", sorted(NATIVE))

# Around the rows where the way changes, the block ends, or each thread gets blocks of its own.
ROWS = [65, 96, 97, 129, 256, 383, 385, 513, 767, 1030, 1600]
SHAPES = [(31, 33), (257, 100), (290, 64), (520, 17), (1100, 40)]


def some_rows(count: int) -> list[int]:
    edges = {i for edge in range(0, count + 1, 256) for i in (edge - 1, edge, edge + 33)}
    wanted = {0, 31, 32, count // 2, count - 1} | edges
    return sorted(i for i in wanted if 0 <= i < count)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_product(name: str, shape: tuple[int, int], is_int8: bool) -> None:
    width, outputs = shape
    bias = randn(1, outputs, dtype=torch.bfloat16)
    w = int8(2, outputs, width) if is_int8 else randn(2, outputs, width, dtype=torch.bfloat16)
    scale = randn(3, outputs).abs() / 100 if is_int8 else None
    x = randn(4, max(ROWS), width, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    alone = {i: NATIVE[name].linear(x[i : i + 1], w, bias, scale)[0] for i in some_rows(len(x))}
    exact = x.double() @ (w.double() * (1.0 if scale is None else scale.double()[:, None])).T
    exact += bias.double()
    for rows in ROWS:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            full = NATIVE[name].linear(x[:rows], w, bias, scale)
            torch.testing.assert_close(full.double(), exact[:rows], atol=0.4, rtol=1e-2)
            for i in alone.keys() & set(range(rows)):
                assert torch.equal(full[i], alone[i]), (rows, threads, i)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (290, 33), (40, 520)])
def test_rows_of_experts(name: str, shape: tuple[int, int], is_int8: bool) -> None:
    counts = (300, 1, 129, 0, 700, 64, 130)
    groups: list[tuple[ExpertWeights, int]] = [
        (expert(20 * i, shape, torch.bfloat16, is_int8), n) for i, n in enumerate(counts)
    ]
    x = randn(9, sum(counts), shape[0], dtype=torch.bfloat16)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        full = NATIVE[name].experts(x, groups)
        start = 0
        for weights, count in groups:
            for i in some_rows(count):
                row = x[start + i : start + i + 1]
                alone = NATIVE[name].experts(row, [(weights, 1)])[0]
                assert torch.equal(full[start + i], alone), (threads, count, i)
            start += count
