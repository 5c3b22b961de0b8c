"""Memory of exchanges: used again for the same shape, never more than was promised."""

from __future__ import annotations

import torch

from router.row_pool import KEPT_BYTES, RowPool

BF16 = torch.bfloat16


def kept(pool: RowPool) -> int:
    return sum(rows.view.nbytes for rows in pool._spare)


def test_rows_of_a_shape_are_used_again() -> None:
    pool = RowPool()
    first, other = pool.take(4, 8, BF16), pool.take(4, 8, torch.float32)
    first.tensor.fill_(3)
    pool.give_back(first)
    pool.give_back(other)
    again = pool.take(4, 8, BF16)
    assert again.tensor.data_ptr() == first.tensor.data_ptr()
    assert pool.take(4, 8, BF16).tensor.data_ptr() != first.tensor.data_ptr()
    assert bytes(again.bytes_of(1, 3)) == bytes(again.tensor[1:3].view(torch.int16).numpy())


def test_what_prefills_leave_behind_is_bounded() -> None:
    pool = RowPool()
    quarter = KEPT_BYTES // 4 // 2 // 1024
    for extra in range(6):
        pool.give_back(pool.take(quarter + extra, 1024, BF16))
        assert kept(pool) <= KEPT_BYTES
    assert kept(pool) > KEPT_BYTES // 2
    pool.give_back(pool.take(5 * quarter, 1024, BF16))
    assert kept(pool) <= KEPT_BYTES
    for _ in range(3):
        pool.give_back(pool.take(1, 1024, BF16))
    assert [rows.kind[0] for rows in pool._spare][-1] == 1
