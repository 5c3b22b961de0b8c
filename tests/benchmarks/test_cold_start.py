"""What the cold-start benchmark rests on: files that really are out of the page cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page_cache import cached_share, drop

MIB = 1 << 20


def test_what_is_dropped_is_not_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 * MIB + 5))
    assert cached_share(tmp_path) == 1.0
    left = drop(tmp_path)
    if left == 1.0:
        pytest.skip("this file system has nowhere else to keep it")
    assert left < 0.05
    with file.open("rb") as opened:
        opened.seek(4 * MIB)
        opened.read(1)
    assert left < cached_share(tmp_path) <= 1.0
    file.read_bytes()
    assert cached_share(tmp_path) == 1.0
