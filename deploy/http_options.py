"""How the API behaves as a web server."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#@]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """Python handles are not concerned. No origins: what other sites' pages send is not shared."""

    max_request_bytes: int = 16 * 2**20
    body_timeout_s: float = 60.0
    """In which a request's body must have come."""
    request_timeout_s: float | None = None
    """In which a request must have been answered to the end; None: however long it takes."""
    cors_origins: tuple[str, ...] = ()


def check_origin(origin: str) -> str:
    """An origin as browsers send it, or `*`. Raises ValueError."""
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError("allowed values are * and origins such as https://example.org, no path")
    return origin
