"""Our own log lines, and no other library's, on standard error."""

from __future__ import annotations

import logging


def log_to_stderr(level: int) -> None:
    """Show this process's `conclave` lines from `level` on."""
    logger = logging.getLogger("conclave")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
