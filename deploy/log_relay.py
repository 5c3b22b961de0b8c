"""Log lines of a session's processes on the standard error of the command that started it.

Ray keeps its workers' output in files, which go with the session. Here they write to one socket in
the session's private folder instead.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.logs import MAX_LINE, RELAY_SOCKET


@contextmanager
def relayed_logs(folder: str) -> Iterator[None]:
    """Show the lines of all processes of the session in `folder`, until the end of the block."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(Path(folder) / RELAY_SOCKET))
        printer = threading.Thread(target=_print_all, args=(inbox,), daemon=True)
        printer.start()
        try:
            yield
        finally:
            inbox.shutdown(socket.SHUT_RDWR)  # ends the thread's `recv`
            printer.join()


def _print_all(inbox: socket.socket) -> None:
    while line := inbox.recv(MAX_LINE):
        sys.stderr.write(line.decode("utf-8", "replace") + "\n")
        sys.stderr.flush()
