"""Weights that are in the page cache before anybody reads them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.page_cache import cached_share, drop
from shards.prefetch import begin_prefetch

MIB = 1 << 20


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(24 * MIB + 5))
    if drop(tmp_path) > 0.05:
        pytest.skip("this file system has nowhere else to keep it")
    return tmp_path


def settled_share(folder: Path) -> float:
    """Of the page cache, once nothing more comes into it."""
    share, before = cached_share(folder), -1.0
    while share != before:
        time.sleep(0.2)
        share, before = cached_share(folder), share
    return share


def test_all_of_it(cold: Path) -> None:
    begin_prefetch(cold).join()
    assert settled_share(cold) > 0.95


def test_no_more_than_there_is_room_for(cold: Path) -> None:
    begin_prefetch(cold, most=12 * MIB).join()
    assert 0.2 < settled_share(cold) < 0.5


def test_a_folder_that_is_not_there_is_nobodys_problem(tmp_path: Path) -> None:
    begin_prefetch(tmp_path / "gone").join()
