"""Sliding windows: blocks that nobody reads any more are given up, and not needed to start."""

from __future__ import annotations

from tests.router.test_prefix_cache import Server

WINDOW = 40


def test_a_long_sequence_holds_a_window_of_blocks() -> None:
    server = Server(window=WINDOW, max_num_batched_tokens=64)
    server.admit(list(range(1000)), max_tokens=300)
    held = []
    while server.core.has_work:
        server.step()
        held.append(server.core.load().used_blocks)
    # 40 keys lie in four blocks at most, and a decode step adds one.
    assert max(held[-100:-1]) <= 4
    assert held[-1] == 0


def test_a_prefix_is_found_by_its_last_window() -> None:
    server = Server(window=WINDOW, num_blocks=70, max_model_len=1000)
    assert server.cost(list(range(900))) == 900
    # Takes what was given up first: the blocks far behind the window.
    server.cost([5000 + i for i in range(800)])
    assert server.cost([*range(900), 1, 2]) == 902 - 896


def test_without_its_last_window_nothing_is_found() -> None:
    server = Server(window=WINDOW)
    server.cost(list(range(320)))
    assert server.cost([*range(320), 7]) == 1
    assert server.cost([9, *range(1, 320)]) == 320


def test_the_first_tokens_need_no_whole_window() -> None:
    server = Server(window=WINDOW)
    server.cost(list(range(33)))
    assert server.cost([*range(32), 9, 9]) == 2
