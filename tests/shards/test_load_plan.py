"""What each worker reads: announced from headers, counted, and seen at the system's own call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deploy.check import check_model
from deploy.config import parse_args
from deploy.quantize import quantize_model
from deploy.resolve import resolve
from router.transport.sockets import SocketTransport
from shards.checkpoint import open_model
from shards.load_plan import plan_loading
from shards.spec import GroupSpec, WorkerSpec
from shards.worker import make_worker
from tests.layouts import fuse, read_tensors, split_dbrx_experts
from tests.tiny import FAMILIES, VOCAB_SIZE, write_tiny

WHOLE = {"stages": 2, "expert_shards": 3}
COPIES = {"stages": 3, "expert_shards": 3, "expert_replicas": 2}


@dataclass
class Reads:
    """Byte ranges that `os.preadv` was asked for, by file."""

    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = _preadv(descriptor, buffers, offset)
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        self.ranges[file].append((offset, offset + count))
        return count

    def check_disjoint(self) -> int:
        """No byte twice; returns how many bytes."""
        for ranges in self.ranges.values():
            ends = sorted(ranges)
            assert all(a[1] <= b[0] for a, b in pairwise(ends)), ends
        return sum(end - start for ranges in self.ranges.values() for start, end in ranges)


_preadv = os.preadv


def load(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Reads]:
    """What a real worker says that it read, and what it did read."""
    reads = Reads()
    monkeypatch.setattr(os, "preadv", reads.preadv)
    transport = SocketTransport(spec.peer, spec.group.secret)
    try:
        return make_worker(spec, transport).bytes_read, reads
    finally:
        transport.close()


def group_of(folder: Path, **options: Any) -> GroupSpec:
    return resolve(parse_args({"model": str(folder), **options})).spec


def data_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Where each file's tensor data begins and ends."""
    ends = {}
    for file in folder.glob("*.safetensors"):
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        ends[str(file.resolve())] = (file.stat().st_size - size, file.stat().st_size)
    return ends


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_workers_read_the_files_once_between_them(
    family: str, shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(family, tmp_path, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    group = group_of(folder, **WHOLE)
    plan = plan_loading(group, *open_model(folder))
    assert [f"{p.role}-{p.index}" for p in plan] == [
        *("stage-0", "stage-1"),
        *("expert-0", "expert-1", "expert-2"),
    ]
    everyone = Reads()
    for planned in plan:
        spec = WorkerSpec(group=group, role=planned.role, index=planned.index)
        bytes_read, reads = load(spec, monkeypatch)
        assert planned.num_bytes == bytes_read == reads.check_disjoint() > 0
        for file, ranges in reads.ranges.items():
            everyone.ranges[file] += ranges
    total = sum(tensor.nbytes for tensor in read_tensors(folder).values())
    assert sum(p.num_bytes for p in plan) == total == everyone.check_disjoint()
    for file, (start, end) in data_of(folder).items():
        assert min(everyone.ranges[file])[0] == start
        assert max(everyone.ranges[file])[1] == end


@pytest.mark.parametrize("options", [{}, COPIES], ids=["local", "copies"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_in_one_process_and_experts_on_two(
    family: str, options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(family, tmp_path, dtype=torch.bfloat16)
    group = group_of(folder, **options)
    plan = plan_loading(group, *open_model(folder))
    for planned in plan:
        spec = WorkerSpec(group=group, role=planned.role, index=planned.index)
        bytes_read, reads = load(spec, monkeypatch)
        assert planned.num_bytes == bytes_read == reads.check_disjoint()
    tensors = read_tensors(folder)
    experts = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    copies = options.get("expert_replicas", 1)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(p.num_bytes for p in plan) == total + (copies - 1) * experts
    assert sorted({e for p in plan for e in p.experts}) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["phimoe", "jamba"])
def test_a_tied_table_is_read_by_both_ends(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(family, tmp_path, tie_word_embeddings=True)
    tensors = read_tensors(folder)
    assert "lm_head.weight" not in tensors
    group = group_of(folder, **WHOLE)
    plan = plan_loading(group, *open_model(folder))
    read = 0
    for planned in plan:
        spec = WorkerSpec(group=group, role=planned.role, index=planned.index)
        read += load(spec, monkeypatch)[1].check_disjoint()
    table = VOCAB_SIZE * 64 * 4
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(p.num_bytes for p in plan) == read == total + table


@pytest.mark.parametrize("family", FAMILIES)
def test_other_layouts_are_read_once_as_well(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(family, tmp_path)
    before = set(read_tensors(folder))
    if family == "dbrx":
        split_dbrx_experts(folder)
    else:
        fuse(folder)
    assert set(read_tensors(folder)) != before
    group = group_of(folder, **WHOLE)
    plan = plan_loading(group, *open_model(folder))
    everyone = Reads()
    for planned in plan:
        spec = WorkerSpec(group=group, role=planned.role, index=planned.index)
        bytes_read, reads = load(spec, monkeypatch)
        assert planned.num_bytes == bytes_read
        for file, ranges in reads.ranges.items():
            everyone.ranges[file] += ranges
    total = sum(tensor.nbytes for tensor in read_tensors(folder).values())
    assert everyone.check_disjoint() == total


@pytest.mark.parametrize("quantization", ["int8", "int8-all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_files_are_read_with_their_scales(
    family: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "int8"
    assert quantize_model(str(write_tiny(family, tmp_path / "tiny")), folder, quantization) == 0
    group = group_of(folder, **WHOLE)
    plan = plan_loading(group, *open_model(folder))
    for planned in plan:
        spec = WorkerSpec(group=group, role=planned.role, index=planned.index)
        assert load(spec, monkeypatch)[1].check_disjoint() == planned.num_bytes
    total = sum(tensor.nbytes for tensor in read_tensors(folder).values())
    assert sum(p.num_bytes for p in plan) == total


def test_check_prints_what_each_worker_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny("jamba", tmp_path)
    assert check_model({"model": str(folder), **COPIES}) == 0
    rows = re.findall(
        r"│ ((?:stage|expert)-\d+|all) +│(.*)│(.*)│ +([\d,]+) │", capsys.readouterr().out
    )
    shown = {name: int(count.replace(",", "")) for name, _, _, count in rows}
    total = shown.pop("all")
    group = group_of(folder, **COPIES)
    for planned in plan_loading(group, *open_model(folder)):
        spec = WorkerSpec(group=group, role=planned.role, index=planned.index)
        _, reads = load(spec, monkeypatch)
        assert shown.pop(spec.peer) == reads.check_disjoint()
        total -= planned.num_bytes
    assert not shown
    assert not total
    # Four experts twice over three shards, in one line: 0 1 2 | 3 0 1 | 2 3.
    experts = {name: held.strip() for name, _, held, _ in rows if name.startswith("expert")}
    assert experts == {"expert-0": "0-2", "expert-1": "0-1, 3", "expert-2": "2-3"}


def test_check_of_a_topology_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny("dbrx", tmp_path)
    assert check_model({"model": str(folder), "stages": "9"}) == 1
    assert "stages=9" in capsys.readouterr().out
    assert check_model({"model": str(folder)}) == 0
    out = capsys.readouterr().out
    total = sum(tensor.nbytes for tensor in read_tensors(folder).values())
    assert re.search(rf"engine-0 +│ 0-2 +│ 0-3 +│ +{total:,} │", out)


def test_the_command_line_takes_a_topology() -> None:
    command = [sys.executable, "-m", "deploy.cli", "check", "nano-dbrx"]
    command += ["--stages", "2", "--expert-shards", "4", "--expert-replicas", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(?:stage|expert)-\d", done.stdout) == [
        *("stage-0", "stage-1"),
        *("expert-0", "expert-1", "expert-2", "expert-3"),
    ]
