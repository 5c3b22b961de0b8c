"""Whether a grammar can be compiled in bounded time, memory and depth: asked of a child process."""

from __future__ import annotations

import json
import logging
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

from deploy.grammar_child import LENGTH

log = logging.getLogger("conclave.ingress")

CHECK_S = 2.0
"""Honest grammars take milliseconds."""
_START_S = 60.0
_MOST_KEPT = 256


class TooComplex(ValueError):
    """The child did not live to say what it thinks of a grammar, or not in time."""


class GrammarCheck:
    """Thread-safe; one grammar at a time. The child is started when it is first needed, and again
    after one that it did not survive; it ends with this process."""

    def __init__(self, seconds: float = CHECK_S) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._passed: OrderedDict[bytes, list[str]] = OrderedDict()
        """By their text's hash: the same forms are asked for again and again."""

    def messages(self, grammar: str) -> list[str]:
        """llguidance's errors and warnings; none: it is fine. Raises TooComplex."""
        text = grammar.encode()
        key = sha256(text).digest()
        with self._lock:
            if key in self._passed:
                self._passed.move_to_end(key)
                return self._passed[key]
            try:
                found = self._ask(text)
            except TooComplex:
                self._end()
                raise
            self._passed[key] = found
            if len(self._passed) > _MOST_KEPT:
                self._passed.popitem(last=False)
            return found

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _ask(self, text: bytes) -> list[str]:
        child = self._child
        if child is None or child.poll() is not None:
            child = self._child = self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(LENGTH.pack(len(text)) + text)
            child.stdin.flush()
        except OSError as error:
            raise TooComplex("it could not be checked") from error
        found: list[str] = json.loads(self._reply(child, self._seconds))
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-m", "deploy.grammar_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Where these packages are, whatever the caller's own folder is.
            cwd=Path(__file__).resolve().parent.parent,
        )
        try:
            self._reply(child, _START_S)
        except TooComplex:
            child.kill()
            child.wait()
            raise RuntimeError(
                "grammars cannot be checked: the process for it does not start"
            ) from None
        return child

    def _reply(self, child: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The child's next frame, in time."""
        assert child.stdout is not None
        until = time.monotonic() + seconds
        data = b""
        while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
            left = until - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                raise TooComplex(f"compiling it takes longer than {self._seconds:g} s")
            piece = child.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not piece:
                raise TooComplex("it is too deep or too large to be compiled")
            data += piece
        return data[LENGTH.size :]

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError as error:  # what was never read is still in its buffer
                log.debug("the checker's pipe: %s", error)


GRAMMARS = GrammarCheck()
"""Of this process: one child however many models it serves."""
