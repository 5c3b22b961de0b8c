"""Kernel calls that are written down first and run in one go.

Weights that stream through the caches leave Python's code and data cold: between two calls its
statements take several times as long as one after the other. A step of few rows, whose calls are
short, is therefore written down whole before the first weight is read.
"""

from __future__ import annotations

import ctypes
from functools import cache

from models.kernels.functions import function
from models.kernels.variants import VARIANTS, load

FEW_ROWS = 32
"""Up to here a step is written down: all layers' activations together are small."""


@cache
def _address(variant_name: str, symbol: str) -> int:
    variant = next(v for v in VARIANTS if v.name == variant_name)
    address = ctypes.cast(load(variant)[symbol], ctypes.c_void_p).value
    assert address is not None, symbol
    return address


class Program:
    """C functions of one structure, in the order in which they were added.

    Whoever reads what a call writes, other than by another call, runs the program before.
    """

    def __init__(self) -> None:
        self._kernels = ""
        self._calls: list[int] = []
        self._waiting: set[int] = set()
        self._kept: list[object] = []

    def add(self, kernels: str, symbol: str, structure: int, *kept: object) -> None:
        """A call for later. Until then `kept` lives, and the structure must not change."""
        assert structure not in self._waiting, f"{symbol}: its structure waits already"
        self._waiting.add(structure)
        self._kernels = kernels
        self._calls += (_address(kernels, symbol), structure)
        self._kept += kept

    def run(self) -> None:
        """Compute what was added since the last time. Raises MemoryError."""
        if not self._calls:
            return
        calls = (ctypes.c_int64 * (1 + len(self._calls)))(len(self._calls) // 2, *self._calls)
        failed = function(self._kernels, "conclave_run")(ctypes.addressof(calls))
        self._calls, self._kept = [], []
        self._waiting.clear()
        if failed:
            raise MemoryError("no memory for what lies between two kernels")


def call(kernels: str, symbol: str, structure: int, program: Program | None, *kept: object) -> None:
    """Now, or later where there is a program. Raises MemoryError."""
    if program is not None:
        program.add(kernels, symbol, structure, *kept)
    elif function(kernels, symbol)(structure):
        raise MemoryError("no memory for what lies between two kernels")
