"""CONCLAVE_REHEARSAL: an application as it is configured, but with a nano model and on CPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.backends import ATTENTION_ALIASES
from deploy.config import ConfigError, ServeArgs, parse_args
from deploy.demo import NANO_MODELS, nano_checkpoint
from shards.partition import LayerRanges, layer_ranges_text

if TYPE_CHECKING:
    from models.interface import ModelConfig

VARIABLE = "CONCLAVE_REHEARSAL"
# What needs a GPU, and what is taken instead.
_ON_CPUS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "device": (("cuda",), "cpu"),
    "layout": (("colocated",), "disaggregated"),
    "attention_backend": (("flash_attn", "triton"), "auto"),
    "mamba_backend": (("mamba_ssm", "triton"), "auto"),
}


def rehearsed(options: Mapping[str, Any]) -> tuple[ServeArgs, tuple[str, ...]]:
    """The checked options of an application, and what a rehearsal has changed in them, in words.

    Without the variable: nothing. Raises ConfigError.
    """
    nano = os.environ.get(VARIABLE, "")
    if not nano:
        return parse_args(options), ()
    if nano not in NANO_MODELS:
        raise ConfigError(f"{VARIABLE}={nano}: allowed values are {', '.join(NANO_MODELS)}")
    from models.registry import load_config

    return rehearsal(options, nano, load_config(nano_checkpoint(nano)))


def rehearsal(
    options: Mapping[str, Any], nano: str, config: ModelConfig
) -> tuple[ServeArgs, tuple[str, ...]]:
    """The same with the model `nano`, whose configuration is given. Raises ConfigError.

    Everything that is configured stays, but for GPUs and for what the small model has less of.
    """
    taken = _on_cpus(options)
    if "model" in options:
        taken["model"] = nano
        # Clients ask for the name that they will ask for later.
        taken.setdefault("served_model_name", Path(str(options["model"])).name)
    args = parse_args(taken)
    changes = _cut(args, config)
    shown = {key: (options.get(key), taken[key]) for key in ("model", *_ON_CPUS) if key in taken}
    shown |= {key: (getattr(args, key), value) for key, value in changes.items()}
    notes = tuple(
        f"{VARIABLE}: {key}={_text(value)} instead of {_text(asked)}"
        for key, (asked, value) in shown.items()
        if value != asked
    )
    return args.model_copy(update=changes), notes


def recut(ranges: LayerRanges, num_layers: int) -> LayerRanges:
    """The same cuts in proportion, every stage with a layer; no more stages than layers."""
    total, count = ranges[-1][1], min(len(ranges), num_layers)
    cuts = [0]
    for stage, (_, end) in enumerate(ranges[:count], start=1):
        most = num_layers - (count - stage)
        cuts.append(min(max(round(end * num_layers / total), cuts[-1] + 1), most))
    return tuple(pairwise(cuts))


def _on_cpus(options: Mapping[str, Any]) -> dict[str, Any]:
    taken = dict(options)
    for key, (of_gpus, instead) in _ON_CPUS.items():
        asked = options.get(key)
        if isinstance(asked, str) and ATTENTION_ALIASES.get(asked, asked) in of_gpus:
            taken[key] = instead
    return taken


def _cut(args: ServeArgs, config: ModelConfig) -> dict[str, Any]:
    """What a smaller model has less of: layers, experts, positions."""
    copies = config.num_experts * args.expert_replicas
    most = {
        "stages": config.num_layers,
        "expert_shards": copies,
        "max_model_len": config.max_position_embeddings,
    }
    changes: dict[str, Any] = {
        key: bound for key, bound in most.items() if (getattr(args, key) or 0) > bound
    }
    if args.stage_layers is not None:
        changes["stage_layers"] = recut(args.stage_layers, config.num_layers)
    return changes


def _text(value: object) -> str:
    return layer_ranges_text(value) if isinstance(value, tuple) else str(value)
