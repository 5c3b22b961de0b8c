"""What dispatching costs, counted by those who dispatch and summed by the ingress."""

from __future__ import annotations

import asyncio

import pytest

from router.layer_totals import LayerTotals, sum_by_layer
from router.step import SamplingParams
from tests.groups import ask, kill_worker, running_group

LAYERS, HIDDEN, TOP_K, FLOAT32 = 4, 96, 2, 4
PROMPT = tuple(range(5, 16))
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


def test_totals_of_several_dispatchers_add_up() -> None:
    one = LayerTotals(1, 2, 3, 4, 5, 0.5, [1, 2])
    other = LayerTotals(10, 20, 30, 40, 50, 0.25, [10, 0, 30])
    found = sum_by_layer([{7: one}, {}, {3: other, 7: other}])
    assert list(found) == [3, 7]
    assert found[3] == other
    assert found[7] == LayerTotals(11, 22, 33, 44, 55, 0.75, [11, 2, 30])
    assert one.tokens == [1, 2]


@pytest.mark.parametrize("dispatch", ["actor", "direct"])
async def test_every_row_is_counted(dispatch: str) -> None:
    """Whoever dispatches: each token of each step goes to k experts of every MoE layer and back."""
    options = {"stages": 2, "expert_shards": 2, "hang_deadline": 0.5}
    with running_group("nano-phimoe", processes=True, dispatch=dispatch, **options) as group:
        assert group.layer_totals == {}
        await ask(group, PROMPT, GREEDY)
        steps, rows = GREEDY.max_tokens, len(PROMPT) + GREEDY.max_tokens - 1
        async with asyncio.timeout(20):
            while sum(seen.exchanges for seen in group.layer_totals.values()) < LAYERS * steps:
                await asyncio.sleep(0.05)
        totals = group.layer_totals
        assert list(totals) == list(range(LAYERS))
        for seen in totals.values():
            assert seen.exchanges == steps
            assert steps <= seen.calls <= 2 * steps
            assert seen.resends == 0
            assert sum(seen.tokens) == TOP_K * rows
            assert seen.sent_bytes == seen.received_bytes == TOP_K * rows * HIDDEN * FLOAT32
            assert 0 < seen.seconds < 20
        # A successor counts from nothing.
        kill_worker(group, "stage" if dispatch == "direct" else "dispatcher", 0)
        async with asyncio.timeout(60):
            while sum(seen.exchanges for seen in group.layer_totals.values()) == LAYERS * steps:
                await asyncio.sleep(0.05)
        assert sum(worker.deaths for worker in group.workers()) == 1
