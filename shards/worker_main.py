"""Entry point of a worker subprocess: spec on standard input, start line on standard output."""

from __future__ import annotations

import logging
import os
import sys
import threading

from router.codec import decode, encode
from router.transport.sockets import SocketTransport
from shards.spec import WorkerSpec
from shards.subprocess_launcher import FATAL_EXIT
from shards.worker import announce, make_worker


def _die_with_parent() -> None:
    """Standard input stays open for as long as the parent lives."""
    # The bare descriptor: a thread inside a buffered read would hold up our own exit.
    while os.read(0, 4096):
        continue
    os._exit(1)


def main() -> int:
    """Load, announce, run."""
    logging.basicConfig(level=os.environ.get("CONCLAVE_LOG_LEVEL", "WARNING").upper())
    size = int.from_bytes(sys.stdin.buffer.read(4), "little")
    spec = decode(WorkerSpec, sys.stdin.buffer.read(size))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    transport = SocketTransport(spec.peer, spec.group.secret)
    try:
        worker = make_worker(spec, transport)
        started = announce(worker, spec)
    except ValueError as error:
        print(f"{spec.peer}: {error}", file=sys.stderr)
        return FATAL_EXIT
    sys.stdout.buffer.write(encode(started))
    sys.stdout.buffer.flush()
    # End of file on standard output is what tells the parent that the line is whole.
    os.close(sys.stdout.fileno())
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
