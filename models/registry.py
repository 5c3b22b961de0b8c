"""From a checkpoint's config.json to a model family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.config_fields import ConfigError, UnsupportedModel
from models.dbrx import DbrxConfig
from models.interface import ModelConfig
from models.jamba import JambaConfig
from models.phimoe import PhimoeConfig

__all__ = ["ConfigError", "UnsupportedModel", "load_config", "parse_config"]

_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "dbrx": DbrxConfig.parse,
    "phimoe": PhimoeConfig.parse,
    "jamba": JambaConfig.parse,
}
_ARCHITECTURES = {
    "DbrxForCausalLM": "dbrx",
    # The hub's spelling, then Transformers' own.
    "PhiMoEForCausalLM": "phimoe",
    "PhimoeForCausalLM": "phimoe",
    "JambaForCausalLM": "jamba",
}


def load_config(path: Path) -> ModelConfig:
    """Read a config.json, given itself or its checkpoint folder.

    ConfigError names what cannot be served; OSError if there is no such file.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Parse config.json's object; ConfigError names what cannot be served."""
    try:
        return _FAMILIES[_family(raw)](raw)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"config.json holds a value of a wrong kind: {error}") from error


def _family(raw: Mapping[str, Any]) -> str:
    """By `architectures` where given, else by `model_type`."""
    architectures = raw.get("architectures") or []
    known = [_ARCHITECTURES[a] for a in architectures if a in _ARCHITECTURES]
    if known:
        return known[0]
    if architectures:
        raise UnsupportedModel(
            f"architectures is {architectures!r}, but must name one of " + ", ".join(_ARCHITECTURES)
        )
    model_type = raw.get("model_type")
    if model_type not in _FAMILIES:
        raise UnsupportedModel(
            f"model_type is {model_type!r}, but must be one of " + ", ".join(_FAMILIES)
        )
    return str(model_type)
