"""What an instance has left behind: processes, listening sockets, shared memory."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

_MARK = "CONCLAVE_CHAOS_MARK"
_SHARED = "/dev/shm/"


class Belongings:
    """Marks every process that is started from now on; knows what they held when last looked at.

    `addresses` of `left` are those that the workers announced.
    """

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        os.environ[_MARK] = self._mark
        self._shared: set[str] = set()

    def processes(self) -> set[int]:
        """Living processes that this one, or anything it started, has started since."""
        wanted, found = f"{_MARK}={self._mark}".encode(), set()
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if wanted in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found.add(int(entry))
            except OSError:
                continue
        return found - {os.getpid()}

    def look(self) -> None:
        """Remember which files of shared memory they have mapped."""
        for pid in self.processes():
            try:
                maps = Path("/proc", str(pid), "maps").read_text()
            except OSError:
                continue
            for line in maps.splitlines():
                path = line.partition(_SHARED)[2]
                if path:
                    self._shared.add(_SHARED + path.removesuffix(" (deleted)"))

    def left(self, addresses: Iterable[str]) -> list[str]:
        """What is still there, in words."""
        names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
        sockets = [
            a for a in addresses if a.startswith("unix:") and a.removeprefix("unix:") in names
        ]
        return [
            *(f"process {pid}: {_command(pid)}" for pid in sorted(self.processes())),
            *(f"socket {address}" for address in sorted(sockets)),
            *(f"memory {path}" for path in sorted(self._shared) if os.path.exists(path)),
        ]


def _command(pid: int) -> str:
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace").strip()
    except OSError:
        return "gone"
