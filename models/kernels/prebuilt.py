"""Kernels that were compiled beforehand, for machines without a compiler.

`python -m models.kernels.prebuilt FOLDER` compiles every variant; where the environment variable
CONCLAVE_PREBUILT_KERNELS names that folder, they are loaded from there and nothing is compiled.
"""

from __future__ import annotations

import argparse
import os
import platform
import stat
import sys
from pathlib import Path

VARIABLE = "CONCLAVE_PREBUILT_KERNELS"


def prebuilt(name: str) -> Path | None:
    """A library of this name from the folder that the environment names; None without one.

    What anybody but its owner could have written is not loaded, nor what belongs to neither this
    user nor root.
    """
    folder = os.environ.get(VARIABLE, "")
    if not os.path.isabs(folder):
        return None
    path = Path(folder) / name
    trusted = _is_trusted(path, stat.S_ISREG) and _is_trusted(path.parent, stat.S_ISDIR)
    return path if trusted else None


def _is_trusted(path: Path, is_kind: object) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_kind(found.st_mode) and found.st_uid in (0, os.geteuid()) and not shared
