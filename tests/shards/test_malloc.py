"""The C library's memory, seen from a process of its own: what its pages cost."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set"
)

_FAULTS = """
import ctypes, resource
from shards.malloc import large_blocks_apart

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 8 << 20
{enter}
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(size) for _ in range(12)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults_of_a_round(enter: str) -> int:
    """Page faults of the fourth time that 96 MiB are allocated, written and freed."""
    program = _FAULTS.format(enter=enter)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(run.stdout)


def test_freed_activations_are_kept() -> None:
    assert _faults_of_a_round("with large_blocks_apart(): pass") < 10
    assert _faults_of_a_round("") > 40
