"""The harness's end of the proxy: addresses to announce instead of the workers' own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

from benchmarks.faults.kinds import Link


class Wire:
    """A proxy process in front of every worker; its links can be reset, cut, delayed, throttled.

    `kind` (unix or tcp) is how the workers reach the proxy. Thread-safe.
    """

    def __init__(self, kind: str) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.proxy", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def front(self, peer: str, address: str) -> str:
        """An address that leads to `address`, where `peer` listens."""
        return str(self._ask(do="front", peer=peer, address=address))

    def links(self) -> list[Link]:
        """(dialler, dialled) of every open connection, each once."""
        return [(str(dialer), str(peer)) for dialer, peer in self._ask(do="links")]

    def reset(self, link: Link) -> int:
        """Break a link's connections now; how many there were."""
        return int(self._ask(do="reset", link=link))

    def cut(self, link: Link) -> int:
        """Break a link's connections in the middle of the next chunk; how many there are."""
        return int(self._ask(do="cut", link=link))

    def slow(self, link: Link, *, delay: float = 0.0, rate: float = 0.0) -> int:
        """Hold up each chunk by `delay` seconds and pass on `rate` bytes a second (0: all)."""
        return int(self._ask(do="slow", link=link, delay=delay, rate=rate))

    def calm(self) -> None:
        """Every link is as fast as it can be again."""
        self._ask(do="calm")

    def close(self) -> None:
        """End the proxy and with it every connection."""
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()

    def _ask(self, **command: object) -> Any:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise ConnectionError("the proxy has ended")
        return json.loads(line)
