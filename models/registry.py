"""From a checkpoint's config.json to a model family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.config_fields import ConfigError, UnsupportedModel, shown
from models.dbrx import DbrxConfig
from models.heads import LM, SCORE
from models.interface import ModelConfig
from models.jamba import JambaConfig
from models.phimoe import PhimoeConfig

__all__ = ["ConfigError", "UnsupportedModel", "load_config", "parse_config"]

_FAMILIES: Mapping[str, Callable[[Mapping[str, Any], frozenset[str]], ModelConfig]] = {
    "dbrx": DbrxConfig.parse,
    "phimoe": PhimoeConfig.parse,
    "jamba": JambaConfig.parse,
}
_ARCHITECTURES = {
    "DbrxForCausalLM": ("dbrx", LM),
    # The hub's spelling, then Transformers' own.
    "PhiMoEForCausalLM": ("phimoe", LM),
    "PhimoeForCausalLM": ("phimoe", LM),
    "PhiMoEForSequenceClassification": ("phimoe", SCORE),
    "PhimoeForSequenceClassification": ("phimoe", SCORE),
    "JambaForCausalLM": ("jamba", LM),
    "JambaForSequenceClassification": ("jamba", SCORE),
}


def load_config(path: Path) -> ModelConfig:
    """Read a config.json, given itself or its checkpoint folder.

    ConfigError names what cannot be served; OSError if there is no such file.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Parse config.json's object; ConfigError names what cannot be served."""
    family, heads = _family_and_heads(raw)
    return _FAMILIES[family](raw, heads)


def _family_and_heads(raw: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    """By `architectures`, all of them, where given; else by `model_type`, with the `lm` head."""
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if not architectures:
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            raise UnsupportedModel(
                f"model_type is {shown(model_type)}, but must be one of " + ", ".join(_FAMILIES)
            )
        return model_type, frozenset({LM})
    if not isinstance(architectures, list):
        raise UnsupportedModel(
            f"architectures is {shown(architectures)}, but must be a list of names"
        )
    found = [_architecture(name) for name in architectures]
    families = {family for family, _ in found}
    if len(families) > 1:
        raise UnsupportedModel(f"architectures is {shown(architectures)}, but must name one family")
    family = families.pop()
    if model_type is not None and model_type != family:
        raise UnsupportedModel(
            f"model_type is {shown(model_type)}, but must be {family!r} as architectures says"
        )
    return family, frozenset(head for _, head in found)


def _architecture(name: object) -> tuple[str, str]:
    if name == "DbrxForSequenceClassification":
        raise UnsupportedModel(
            f"architectures names {name}, but DBRX has no classification head: "
            "it must be DbrxForCausalLM"
        )
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"architectures names {shown(name)}, but must name one of " + ", ".join(_ARCHITECTURES)
        )
    return _ARCHITECTURES[name]
