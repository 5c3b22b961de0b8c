"""Cores as the system limits them, and how many threads that makes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.exchange_peer import worker_spec
from shards.cores import available_cores, default_threads, spin_seconds
from shards.spec import Role


@pytest.mark.parametrize(
    ("own", "limits", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {".": "250000 100000"}, 3),
        ("0::/\n", {".": "20000 100000"}, 1),
        ("0::/pod/box\n", {"pod": "600000 100000", "pod/box": "max 100000"}, 6),
        ("0::/pod/box\n", {"pod": "max 100000", "pod/box": "200000 100000"}, 2),
        ("0::/pod/box\n", {"pod": "1600000 100000", "other": "100000 100000"}, 8),
        ("4:cpu:/pod\n", {"pod": "100000 100000"}, 8),
        ("", {}, 8),
    ],
)
def test_limits_of_all_cgroups_around_a_process_count(
    own: str,
    limits: dict[str, str],
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cgroup").write_text(own)
    for folder, text in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(text + "\n")
    assert available_cores(tmp_path / "cgroup", tmp_path) == cores
    assert available_cores(tmp_path / "not there", tmp_path) == 8


@pytest.mark.parametrize(
    ("kernels", "cores", "actors", "threads"),
    [
        ("avx2", 8, 1, 8),
        ("avx2", 8, 3, 2),
        ("avx2", 2, 6, 1),
        ("amx,-rope", 8, 1, 1),
        ("torch", 8, 1, 1),
    ],
)
def test_threads_share_the_cores(kernels: str, cores: int, actors: int, threads: int) -> None:
    assert default_threads(kernels, cores, actors) == threads


def test_workers_spin_only_where_each_has_a_core() -> None:
    group = worker_spec(Role.STAGE, 0, 2).group  # a stage, two shards, a dispatcher
    assert spin_seconds(group, 3) == 0
    assert 0 < spin_seconds(group, 4) < 1e-3
    assert spin_seconds(replace(group, threads=2), 6) == 0
    assert spin_seconds(replace(group, threads=2), 7) > 0
