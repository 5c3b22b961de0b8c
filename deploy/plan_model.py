"""The model that a plan is for: a checkpoint's config.json and headers, or published sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from deploy.config import ConfigError
from deploy.demo import NANO_MODELS
from deploy.plan_sizes import Numeric, weight_sizes
from deploy.published import find_published, published_models
from deploy.resolve import itemsize, model_folder
from models.registry import load_config, parse_config
from shards.safetensors_file import INDEX_FILE, SINGLE_FILE, StoredTensor, read_header

if TYPE_CHECKING:
    from models.interface import ModelConfig

_SCALES = "_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A parsed configuration and where it is from: `published`, `config` or `checkpoint`."""

    name: str
    source: str
    config: ModelConfig
    tensors: frozenset[str] = frozenset()
    """Names of the checkpoint's, where it is here."""
    notes: tuple[str, ...] = ()


def planned_model(model: str) -> PlannedModel:
    """What MODEL names. Raises deploy's ConfigError for no model, ValueError for a bad one."""
    if model not in NANO_MODELS and not Path(model).expanduser().exists():
        return _published(model)
    folder = model_folder(model)
    config = load_config(folder)
    name = model if model in NANO_MODELS else folder.name
    tensors = _stored_tensors(folder)
    if not tensors:
        notes = ("no weights are in the folder: sizes are those of config.json",)
        return PlannedModel(name=name, source="config", config=config, notes=notes)
    names = frozenset(tensors)
    config = config.with_tensors(names)
    return PlannedModel(
        name=name,
        source="checkpoint",
        config=config,
        tensors=names,
        notes=_differences(config, tensors),
    )


def _published(model: str) -> PlannedModel:
    found = find_published(model)
    if found is None:
        known = ", ".join((*NANO_MODELS, *(each.name for each in published_models())))
        raise ConfigError(
            f"model={model}: no such folder; allowed values are a checkpoint folder, {known}, or "
            "the hub's name of one of these"
        )
    notes = (f"sizes are those published for {', '.join(found.checkpoints)}",)
    config = parse_config(found.config)
    return PlannedModel(name=found.name, source="published", config=config, notes=notes)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, none where there are no weights. Raises ValueError."""
    try:
        index = folder / INDEX_FILE
        if (folder / SINGLE_FILE).is_file():
            files = {SINGLE_FILE}
        elif index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            return {}
        found: dict[str, StoredTensor] = {}
        for file in sorted(files):
            found.update(read_header(folder / file))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: weights cannot be read: {error}") from error
    return found


def _differences(config: ModelConfig, tensors: dict[str, StoredTensor]) -> tuple[str, ...]:
    """Whether the files hold another number of parameters than the plan counts."""
    surplus = config.ignored_tensors(tensors)
    stored = sum(
        prod(tensor.shape)
        for name, tensor in tensors.items()
        if name not in surplus and not name.endswith(_SCALES)
    )
    plain = Numeric(itemsize=itemsize(config.dtype_name), quantization="none")
    counted = weight_sizes(config, plain, frozenset(tensors)).parameters
    if stored == counted:
        return ()
    return (
        f"the files hold {stored:,} parameters, config.json says {counted:,}: see conclave check",
    )
