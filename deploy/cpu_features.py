"""The instruction set that decides which kernels run, read without torch."""

from __future__ import annotations

import platform
from pathlib import Path

# Widest first, by the kernel's flag names.
_LEVELS = (("amx_bf16", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"))


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """`x86_64+amx` and the like; the bare machine name where nothing more is known."""
    machine = platform.machine()
    if not cpuinfo.is_file():
        return machine
    flags: set[str] = set()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            flags.update(line.partition(":")[2].split())
            break
    level = next((name for flag, name in _LEVELS if flag in flags), None)
    return machine if level is None else f"{machine}+{level}"
