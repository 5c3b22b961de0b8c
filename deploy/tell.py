"""What the command line says on standard error: a sentence, or one more JSON line of the log."""

from __future__ import annotations

import logging
import sys

from shards.logs import JsonLines, shown_format


def tell(message: str, level: int = logging.INFO) -> None:
    """Say it, whatever the log's level is, in the format that this process's log has."""
    line = f"conclave: {message}"
    if shown_format() == "json":
        record = logging.LogRecord("conclave.cli", level, "", 0, message, None, None)
        line = JsonLines().format(record)
    print(line, file=sys.stderr, flush=True)
