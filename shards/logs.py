"""Our own log lines, and no other library's, on standard error: as text or as JSON."""

from __future__ import annotations

import json
import logging
import os
import socket
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

RUNTIME_FOLDER = "CONCLAVE_RUNTIME_DIR"
"""Environment variable of every process of a session of our own: its private folder."""
RELAY_SOCKET = "log"
"""In that folder, where somebody shows what comes: one line per datagram."""
MAX_LINE = 1 << 16
FORMATS = ("text", "json")
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being answered here; every line says it."""


def log_to_stderr(level: int, log_format: str = "text") -> None:
    """Show this process's `conclave` lines from `level` on."""
    logger = logging.getLogger("conclave")
    logger.setLevel(level)
    if not logger.handlers:
        handler = relay_handler() or logging.StreamHandler()
        handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
        logger.addHandler(handler)
        logger.propagate = False


def relay_handler() -> logging.Handler | None:
    """What sends lines to the session's own terminal; None where nobody listens."""
    folder = os.environ.get(RUNTIME_FOLDER)
    address = Path(folder, RELAY_SOCKET) if folder else None
    return _Relay(str(address)) if address is not None and address.is_socket() else None


class _Relay(logging.Handler):
    def __init__(self, address: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.connect(address)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace")
            self._socket.send(line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + b"...")
        except Exception:  # also when the session ends first: said on standard error
            self.handleError(record)


def shown_format() -> str:
    """The format that this process's lines have."""
    handlers = logging.getLogger("conclave").handlers
    return "json" if any(isinstance(each.formatter, JsonLines) for each in handlers) else "text"


class _Lines(logging.Formatter):
    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        """A traceback. The plain formatter prints it, and Serve's replicas replace `print`."""
        return "".join(traceback.format_exception(*ei)).rstrip()


class TextLines(_Lines):
    """`time level logger: message`, with the request's id and the record's own fields behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        fields = _fields(record)
        tail = "".join(f" {key}={value}" for key, value in fields.items() if value is not None)
        return super().formatMessage(record) + tail


class JsonLines(_Lines):
    """One object per line: time (UTC), level, logger, message, request_id, the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback is in `exception`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record carries beside its message: `extra={"fields": {...}}`."""
    found: dict[str, Any] = {}
    if (current := request_id.get()) != "":
        found["request_id"] = current
    return found | getattr(record, "fields", {})
