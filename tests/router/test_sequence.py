from __future__ import annotations

import pytest

from router.sequence import MAX_OVERTAKES, Sequence
from router.step import Admit, FinishReason, SamplingParams, ScheduledSequence


def _sequence(
    emitted: tuple[int, ...] = (), *, max_model_len: int = 100, **sampling: int
) -> Sequence:
    params = SamplingParams(**{"max_tokens": 5, **sampling}, stop_token_ids=(9,))
    admit = Admit(seq_id=3, epoch=0, prompt=(1, 2, 3), emitted=emitted, sampling=params)
    return Sequence.from_admit(admit, max_model_len=max_model_len, arrival=0)


def test_counts() -> None:
    seq = _sequence((4, 5))
    assert (seq.length, seq.num_prompt, seq.num_emitted, seq.max_length) == (5, 3, 2, 8)
    seq.num_computed = 4
    assert seq.num_pending == 1


def test_max_tokens_is_cut_to_the_model_length() -> None:
    seq = _sequence(max_model_len=6)
    assert seq.sampling.max_tokens == 3
    assert seq.max_length == 6


@pytest.mark.parametrize(
    ("emitted", "min_tokens", "expected"),
    [
        ((), 0, None),
        ((4,), 0, None),
        ((9,), 0, FinishReason.STOP),
        ((9,), 1, FinishReason.STOP),
        ((9,), 2, None),
        ((9, 4), 0, None),
        ((4, 9), 2, FinishReason.STOP),
        ((4, 4, 4, 4, 4), 0, FinishReason.LENGTH),
        ((4, 4, 4, 4, 9), 0, FinishReason.STOP),
        ((4, 4, 4, 4, 9), 6, FinishReason.LENGTH),
    ],
)
def test_finish_reason(
    emitted: tuple[int, ...], min_tokens: int, expected: FinishReason | None
) -> None:
    assert _sequence(emitted, min_tokens=min_tokens).finish_reason is expected


def test_chunks_carry_blocks_once_and_the_full_length() -> None:
    seq = _sequence((4, 5))
    seq.blocks = [7, 8]
    first = ScheduledSequence(
        seq_id=3, start=0, num_tokens=3, token_ids=(1, 2, 3), length=5, new_blocks=(7, 8)
    )
    seq.num_in_flight = 1
    assert seq.next_chunk(3) == first
    seq.landed(first)
    seq.num_computed = 3
    seq.blocks.append(6)
    last = ScheduledSequence(
        seq_id=3, start=3, num_tokens=2, token_ids=(4, 5), length=5, new_blocks=(6,), samples=True
    )
    assert seq.next_chunk(2) == last


def test_rank_is_priority_then_arrival_until_overtaken_too_often() -> None:
    low, high = _sequence(), _sequence()
    low.priority, low.arrival, high.priority, high.arrival = 1, 0, 0, 9
    assert high.rank < low.rank
    low.overtaken = MAX_OVERTAKES - 1
    assert high.rank < low.rank
    low.overtaken = MAX_OVERTAKES
    assert low.rank < high.rank
