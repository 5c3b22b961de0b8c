"""The sizes of published checkpoints, to plan for them before their files are here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """One set of sizes, and the checkpoints on the hub that have it.

    `config` has the keys of a config.json that decide sizes and no others: it cannot be served.
    """

    name: str
    checkpoints: tuple[str, ...]
    config: Mapping[str, Any]


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """All that are bundled."""
    text = Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    return tuple(
        PublishedModel(name=name, checkpoints=tuple(entry["checkpoints"]), config=entry["config"])
        for name, entry in json.loads(text).items()
    )


def find_published(model: str) -> PublishedModel | None:
    """By its short name (`dbrx`), or the hub's with or without the owner; case does not matter."""
    wanted = model.lower()
    for found in published_models():
        full = [name.lower() for name in found.checkpoints]
        if wanted in (found.name, *full, *(name.split("/")[1] for name in full)):
            return found
    return None
