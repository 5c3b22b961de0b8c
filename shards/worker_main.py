"""Entry point of a worker subprocess: spec on standard input, start line on standard output.

With `--spare` its group comes first; it warms up, says so, and waits for the spec.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TypeVar

from router.codec import decode, encode
from router.transport.sockets import SocketTransport
from shards.cores import available_cores, spin_seconds
from shards.spare_process import warm_up
from shards.spec import GroupSpec, WorkerSpec
from shards.start_clock import StartClock
from shards.subprocess_launcher import ALIVE, FATAL_EXIT
from shards.worker import announce, make_worker

_Message = TypeVar("_Message")


def _die_with_parent() -> None:
    """Standard input stays open for as long as the parent lives."""
    # The bare descriptor: a thread inside a buffered read would hold up our own exit.
    while os.read(0, 4096):
        continue
    os._exit(1)


def _read(cls: type[_Message], *, answer: bool = False) -> _Message | None:
    """One message; None where the parent has ended. With `answer` its length is acknowledged."""
    length = sys.stdin.buffer.read(4)
    if not length:
        return None
    if answer:
        _say(ALIVE)
    return decode(cls, sys.stdin.buffer.read(int.from_bytes(length, "little")))


def _say(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main() -> int:
    """Load, announce, run."""
    logging.basicConfig(level=os.environ.get("CONCLAVE_LOG_LEVEL", "WARNING").upper())
    is_spare = "--spare" in sys.argv
    if is_spare:
        group = _read(GroupSpec)
        if group is None:
            return 0
        warm_up(group)
        _say(ALIVE)
    spec = _read(WorkerSpec, answer=is_spare)
    if spec is None:
        return 0
    threading.Thread(target=_die_with_parent, daemon=True).start()
    spin = spin_seconds(spec.group, available_cores())
    transport = SocketTransport(spec.peer, spec.group.secret, spin_seconds=spin)
    try:
        clock = StartClock()
        worker = make_worker(spec, transport, clock=clock)
        started = announce(worker, spec, clock=clock)
    except ValueError as error:
        print(f"{spec.peer}: {error}", file=sys.stderr)
        return FATAL_EXIT
    _say(encode(started))
    # End of file on standard output is what tells the parent that the line is whole.
    os.close(sys.stdout.fileno())
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
