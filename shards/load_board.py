"""Where Ray's workers write how far they are with loading, while somebody wants to know.

The board is Ray's own key-value store, which every process of a cluster reaches. Workers write only
while a watcher has the board open, and the watcher wipes it: nothing stays behind.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.experimental import internal_kv

from shards.load_progress import Report

log = logging.getLogger("conclave.loading")

_NAMESPACE = b"conclave-loading"


@contextmanager
def open_board(prefix: str) -> Iterator[None]:
    """Have the workers whose names begin with `prefix` report, until the end of the block.

    A store that cannot be reached is logged: nobody reports then.
    """
    key = _key(prefix)
    with _logged("opened"):
        internal_kv._internal_kv_put(key, b"open", namespace=_NAMESPACE)
    try:
        yield
    finally:
        with _logged("wiped"):
            internal_kv._internal_kv_del(key, del_by_prefix=True, namespace=_NAMESPACE)


def bytes_read(prefix: str) -> int:
    """What those workers have read so far, in bytes."""
    keys = internal_kv._internal_kv_list(_key(prefix), namespace=_NAMESPACE)
    values = (internal_kv._internal_kv_get(key, namespace=_NAMESPACE) for key in keys)
    return sum(int(value) for value in values if value and value.isdigit())


def reporter(place: str) -> Report | None:
    """How the worker `{prefix}/{replica}/{peer}` reports; None when nobody watches.

    A respawned worker takes its predecessor's place.
    """
    prefix = place.rsplit("/", 2)[0]
    if not internal_kv._internal_kv_exists(_key(prefix), namespace=_NAMESPACE):
        return None

    def report(num_bytes: int) -> None:
        internal_kv._internal_kv_put(place.encode(), str(num_bytes), namespace=_NAMESPACE)

    return report


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Ray raises many kinds; none of them may stop the loading
        log.warning("the board of loading progress cannot be %s: %s", what, error)


def _key(prefix: str) -> bytes:
    return f"{prefix}/".encode()
