"""A checkpoint's small JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(file: Path) -> dict[str, Any]:
    """The file's object, empty where there is no file. Raises ValueError naming the file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file}: is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file}: is nested too deeply to be read") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value
