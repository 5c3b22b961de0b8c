"""Which process a worker is, so that a signal never reaches another one that has its id by now."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_STATE, _START_TIME = 0, 19
"""Fields of /proc/PID/stat, counted from behind the process's name."""


@cache
def _place() -> str:
    """Where process ids mean what they mean here: this boot of this machine, this namespace."""
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"


def birth_of(pid: int) -> str:
    """Tells a process from all that ever had its id, here or elsewhere; empty where unknown."""
    try:
        return f"{_place()} {_fields(_PROC / str(pid))[_START_TIME]}"
    except (OSError, IndexError):
        return ""


def age_s() -> float:
    """Seconds since this process began, to a hundredth; 0.0 where that cannot be known."""
    try:
        began = int(_fields(_PROC / "self")[_START_TIME]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, IndexError, ValueError, AttributeError):
        return 0.0


def is_at_work(pid: int, birth: str) -> bool:
    """Whether a thread of it computes, waits for a core or for a disk: slow perhaps, not hung.

    False of a process that is not of this machine.
    """
    if not birth or birth_of(pid) != birth:
        return False
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return False
    return any(_state(task) in ("R", "D") for task in tasks)


def kill(pid: int, birth: str) -> bool:
    """SIGKILL this process and no other; False when it is gone, elsewhere, or the caller."""
    if sys.platform != "linux" or not birth or pid == os.getpid():
        return False
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # The id cannot change hands any more: what it means is compared after it was opened.
        if birth_of(pid) != birth:
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(process)
    return True


def _state(task: Path) -> str:
    try:
        return _fields(task)[_STATE]
    except (OSError, IndexError):  # it has ended since it was listed
        return ""


def _fields(folder: Path) -> list[str]:
    return (folder / "stat").read_text().rpartition(")")[2].split()
