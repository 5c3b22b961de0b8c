"""Cleans up after a server that was killed outright: its Ray processes, sockets and folders.

Started before Ray as a process of its own that waits on a pipe only the server holds. However the
server ends, the pipe closes. Imports nothing but the standard library's small modules.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

_GRACE_S = 2.0
_GIVE_UP_S = 20.0


def session_processes(folder: str, server: int) -> list[int]:
    """Processes, but for this one and the server, with an open file or argument under `folder`."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if pid not in (os.getpid(), server) and _belongs(pid, folder)]


def _belongs(pid: int, folder: str) -> bool:
    prefix = folder.rstrip("/") + "/"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if prefix.encode() in file.read():
                return True
        # Ray's workers rename themselves, but their output goes to files of the session.
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(prefix):
                return True
    except OSError:
        return False  # it ended while we looked, or it is another user's
    return False


def clean_up(folder: str, server: int) -> None:
    """Wait for the session's processes to end by themselves, kill the rest, remove `folder`."""
    started = time.monotonic()
    while pids := session_processes(folder, server):
        waited = time.monotonic() - started
        if waited > _GIVE_UP_S:
            break
        if waited > _GRACE_S:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """`guardian.py FOLDER`: wait for end of file on standard input, then clean up."""
    server = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        continue
    clean_up(sys.argv[1], server)


if __name__ == "__main__":
    main()
