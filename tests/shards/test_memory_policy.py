"""The C library's memory, seen from a process of its own: what its pages cost."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set"
)

_FAULTS = """
import ctypes, resource
from shards.memory_policy import loading

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


_FROZEN = """
import gc
from shards.memory_policy import loading

with loading():
    loaded = [[] for _ in range(1000)]
assert not any(each is loaded for each in gc.get_objects())
print(gc.get_freeze_count())
"""


def _number(program: str) -> int:
    """What a program of its own prints."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(run.stdout)


def _faults_of_a_round(enter: str) -> int:
    """Page faults of the fourth time that 96 MiB are allocated, written and freed."""
    return _number(_FAULTS.format(enter=enter))


def test_what_is_loaded_is_not_looked_at_again() -> None:
    assert _number(_FROZEN) > 1000


@needs_glibc
def test_freed_activations_are_kept() -> None:
    assert _faults_of_a_round("with loading(): pass") < 10
    assert _faults_of_a_round("") > 40
