"""Kubernetes' quantities as numbers."""

from __future__ import annotations

import re

_SUFFIXES = {
    "": 1.0,
    "m": 1e-3,
    **{suffix: 1000.0**power for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": 1024.0**power for power, suffix in enumerate("KMGTPE", start=1)},
}


def quantity(text: object) -> float:
    """`500m`, `16Gi` or `8` → 0.5, 17179869184.0, 8.0. Raises ValueError."""
    written = str(text)
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", written)
    if parts is None or parts[2] not in _SUFFIXES:
        raise ValueError(f"{written!r} is no quantity")
    return float(parts[1]) * _SUFFIXES[parts[2]]
