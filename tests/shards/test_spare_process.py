"""A warm spare has nothing left to import, whatever worker it becomes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from deploy.config import parse_args
from deploy.resolve import resolve
from models.kernels.choice import resolve_kernels
from router.codec import encode
from shards.spec import WorkerSpec, worker_specs

PROGRAM = """
import os, sys, threading
from dataclasses import replace
from pathlib import Path
from router.codec import decode
from router.transport.sockets import SocketTransport
from shards.spare_process import warm_up
from shards.spec import WorkerSpec
from shards.worker import announce, make_worker

spec = decode(WorkerSpec, sys.stdin.buffer.read())
warm_up(spec.group)
assert threading.active_count() == 1
modules, maps = set(sys.modules), Path("/proc/self/maps").read_text()
worker = make_worker(spec, SocketTransport(spec.peer, spec.group.secret))
announce(worker, spec)
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(sorted(set(sys.modules) - modules), os.getpriority(os.PRIO_PROCESS, 0))
print(sorted(name for name in mapped if ".so" in name and name not in maps))
sys.stdout.flush()
os._exit(0)
"""
PIPELINE: dict[str, Any] = {"stages": 2, "expert_shards": 2}


@pytest.mark.parametrize(
    ("role", "options"),
    [
        ("engine", {}),
        ("engine", PIPELINE),
        ("stage", PIPELINE),
        ("dispatcher", PIPELINE),
        ("expert", PIPELINE),
    ],
)
def test_nothing_is_left_to_import(role: str, options: dict[str, Any]) -> None:
    kernels = resolve_kernels()
    given = {"model": "nano-jamba", "kernels": kernels, "max_num_seqs": 1, **options}
    specs = worker_specs(resolve(parse_args(given)).spec)
    spec = next(each for each in specs if each.role == role)
    done = _run(spec)
    assert done.returncode == 0, done.stderr.decode()
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    assert done.stdout.decode().splitlines() == [f"[] {niceness}", "[]"]


def _run(spec: WorkerSpec) -> subprocess.CompletedProcess[bytes]:
    # A process of its own: this one has imported far more than a worker does.
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, input=encode(spec), capture_output=True, timeout=120)
