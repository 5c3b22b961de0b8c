"""Signals reach the very process they are meant for, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from shards.process_birth import birth_of, is_at_work, kill


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    program = "import sys; sys.stdin.read(1); [0 for _ in iter(int, 1)]"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def becomes(process: subprocess.Popen[bytes], at_work: bool) -> bool:
    until = time.monotonic() + 30
    while is_at_work(process.pid, birth_of(process.pid)) is not at_work:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_only_the_process_itself_is_killed(process: subprocess.Popen[bytes]) -> None:
    birth = birth_of(process.pid)
    assert birth
    assert birth != birth_of(os.getpid())
    for other in ("", birth + "0", birth_of(os.getpid()), "another " + birth.partition(" ")[2]):
        assert not kill(process.pid, other)
    assert process.poll() is None
    assert kill(process.pid, birth)
    assert process.wait(30) == -signal.SIGKILL
    assert not kill(process.pid, birth), "it is gone"
    assert birth_of(process.pid) == ""
    assert not kill(os.getpid(), birth_of(os.getpid()))


def test_who_computes_is_at_work_and_who_waits_or_is_stopped_is_not(
    process: subprocess.Popen[bytes],
) -> None:
    assert becomes(process, False), "it waits for its input"
    assert process.stdin is not None
    process.stdin.write(b"x")
    process.stdin.flush()
    assert becomes(process, True)
    assert not is_at_work(process.pid, birth_of(os.getpid()))
    os.kill(process.pid, signal.SIGSTOP)
    assert becomes(process, False)
