"""Waits between attempts to make broken connections again."""

from __future__ import annotations

from shards.relinks import MAX_RELINK_S, RELINK_S, RELINKS_WINDOW_S, Relinks


def test_breaks_at_one_time_share_a_turn() -> None:
    relinks = Relinks()
    assert not relinks.take(100.0)
    relinks.on_broken(1.0)
    relinks.on_broken(1.01)
    assert relinks.due == 1.0 + RELINK_S
    assert not relinks.take(1.0)
    assert relinks.take(relinks.due)
    assert relinks.due is None


def test_waits_double_while_connections_keep_breaking() -> None:
    relinks, now, waits = Relinks(), 5.0, []
    for _ in range(9):
        relinks.on_broken(now)
        assert relinks.due is not None
        waits.append(round(relinks.due - now, 6))
        now = relinks.due
        assert relinks.take(now)
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, MAX_RELINK_S, MAX_RELINK_S, MAX_RELINK_S]
    now += RELINKS_WINDOW_S
    relinks.on_broken(now)
    assert relinks.due == now + RELINK_S
