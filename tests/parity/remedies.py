"""Transformers as the oracle, corrected where it departs from the models' own definition.

One function per correction; `conftest.py` makes each a fixture of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Model = Any

REMEDIES: dict[str, str] = {}
"""Name of each correction → why the oracle needs it."""


def remedy(why: str) -> Any:
    """Register a correction under its function's name."""

    def register(function: Any) -> Any:
        REMEDIES[function.__name__] = why
        return function

    return register


def load(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Model:
    """Transformers' own model of a checkpoint, uncorrected; `keys` replace those of config.json."""
    config = None
    if keys:
        raw = merged(json.loads((folder / "config.json").read_text()), keys)
        config = AutoConfig.for_model(**raw)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    if dtype is torch.float64:  # which the grouped matrix product of its experts does not know
        model.set_experts_implementation("eager")
    return model.eval()


@remedy(
    "DBRX: Transformers 5 takes the RoPE base from the top level (default 10000) and ignores "
    "`attn_config.rope_theta`, where every DBRX checkpoint keeps it (Databricks' own code)."
)
def rope_base_from_attn_config(model: Model) -> Model:
    """The same weights, rotated with the model's own base."""
    config = model.config
    config.rope_parameters["rope_theta"] = float(config.attn_config.rope_theta)
    corrected = type(model)(config).to(model.dtype)
    corrected.load_state_dict(model.state_dict())
    return corrected.eval()


@remedy(
    "DBRX: Transformers 5 raises on `clip_qkv: null`, the documented default; without a clamp is "
    "the same as a clamp at 1e30."
)
def clip_nothing(model: Model) -> Model:
    """Clamp where nothing is clamped."""
    for block in model.transformer.blocks:
        block.norm_attn_norm.attn.clip_qkv = 1e30
    return model


@remedy(
    "DBRX: Transformers 5 cannot build a model whose `attn_config` names no `rope_theta`; the "
    "documented default is 10000."
)
def default_rope_base(folder: Path) -> Model:
    """The default, written out in the reference's own copy of config.json."""
    return load(folder, attn_config={"rope_theta": 10000.0})


@remedy(
    "DBRX: Transformers 5 refuses an int as `moe_normalize_expert_weights`, as checkpoints have it."
)
def float_weight_norm(folder: Path) -> Model:
    """The same number as a float, in the reference's own copy of config.json."""
    raw = json.loads((folder / "config.json").read_text())
    norm = float(raw["ffn_config"]["moe_normalize_expert_weights"])
    return load(folder, ffn_config={"moe_normalize_expert_weights": norm})


@remedy(
    "PhiMoE: past the original context Transformers 5 switches only the LongRoPE multiplier and "
    "goes on with the short factors; Microsoft's own code switches both."
)
def longrope_switches_factors(model: Model) -> Model:
    """Frequencies from the factors of the sequence's own length."""

    def before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        seq_len = int(positions.max()) + 1
        module.rope_init_fn = lambda config: ROPE_INIT_FUNCTIONS["longrope"](
            config, seq_len=seq_len
        )

    model.model.rotary_emb.register_forward_pre_hook(before_forward, with_kwargs=True)
    return model


@remedy(
    "PhiMoE: Transformers 5 overwrites a LongRoPE context that is given only at the top level, "
    "`original_max_position_embeddings`, with max_position_embeddings."
)
def longrope_context(model: Model, original_max: int) -> Model:
    """The same weights with the context that config.json names."""
    # Both, because Transformers copies the second over the first again in every forward.
    model.config.rope_parameters["original_max_position_embeddings"] = original_max
    model.config.original_max_position_embeddings = original_max
    return model


@remedy(
    "All: one full forward over one unpadded sequence without a cache. Transformers' caches are "
    "wrong for a second chunk of Jamba, refused for stacks without attention, and padding leaks "
    "through Jamba's biased in_proj and into PhiMoE's choice of LongRoPE factors."
)
@torch.no_grad()
def full_forward(model: Model, tokens: Sequence[int], **options: Any) -> Any:
    """Transformers' output object for one sequence of token ids."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False, **options)


def logits_of(model: Model, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 logits [n, V] of each sequence by its own full forward."""
    return [full_forward(model, tokens).logits[0].float() for tokens in sequences]


def edit_config(folder: Path, **keys: Any) -> None:
    """Set top-level keys of config.json; a dict replaces only the keys it names."""
    file = folder / "config.json"
    file.write_text(json.dumps(merged(json.loads(file.read_text()), keys)))


def drop_keys(folder: Path, *paths: str) -> None:
    """Take keys out of config.json, where it has them; `a.b` is key b of object a."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for path in paths:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.get(name, {})
        section.pop(key, None)
    file.write_text(json.dumps(config))


def merged(config: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """`config` with `keys` set; a dict replaces only the keys it names."""
    result = dict(config)
    for key, value in keys.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict)
        result[key] = {**config[key], **value} if merge else value
    return result
