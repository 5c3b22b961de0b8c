"""How far the loading of a model is: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from shards.logs import shown_format

log = logging.getLogger("conclave.loading")

_POLL_S = 0.25
_JOIN_S = 2.0
"""A poll of a cluster that has just died may hang; nobody needs its answer."""
_LOG_STEP = 10
"""Percent between log lines."""

Show = Callable[[int], None]


@contextmanager
def loading_shown(name: str, total: int, poll: Callable[[], int]) -> Iterator[None]:
    """Show how many of `total` bytes `poll` has counted, on standard error, during the block.

    The bar is gone when the block ends, however it ends. A `poll` that fails ends it early.
    """
    if not sys.stderr.isatty() or shown_format() == "json":
        with _polling(poll, _log_lines(name, total)):
            yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"loading {name}", total=total)
        # Replicas that failed and were started again have been counted twice.
        with _polling(poll, lambda done: progress.update(task, completed=min(done, total))):
            yield


@contextmanager
def _polling(poll: Callable[[], int], show: Show) -> Iterator[None]:
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(_POLL_S):
            try:
                show(poll())
            except Exception as error:  # of whatever carries the reports: loading goes on unseen
                log.warning("the progress of loading cannot be shown: %s", error)
                return

    thread = threading.Thread(target=run, name="conclave-load-bar", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_JOIN_S)


def _log_lines(name: str, total: int) -> Show:
    """One line whenever another tenth of the bytes is read."""
    told = 0

    def show(done: int) -> None:
        nonlocal told
        percent = min(100, 100 * done // max(1, total))
        if percent >= told + _LOG_STEP:
            told = percent - percent % _LOG_STEP
            log.info("loading %s: %d %% of %d bytes", name, percent, total)

    return show
