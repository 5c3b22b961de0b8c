"""`quantization_config` of a config.json: what a checkpoint's files hold as int8."""

from __future__ import annotations

from models.config_fields import Fields
from models.interface import ModelConfig

QUANTIZATIONS = ("none", "int8", "int8-all")
"""Nothing; the routed experts; attention projections and dense FFN linears as well."""

_KEY = "quantization_config"
_METHOD = "conclave"


def quantization_config(quantization: str) -> dict[str, object]:
    """The key, with its value, that marks a checkpoint as quantised by us."""
    return {_KEY: {"quant_method": _METHOD, "quantization": quantization}}


def stored_quantization(fields: Fields) -> str:
    """One of QUANTIZATIONS; ConfigError names any method but our own."""
    if not fields.has(_KEY):
        return QUANTIZATIONS[0]
    stored = fields.section(_KEY)
    if not stored.has("quant_method"):
        raise stored.error("quant_method", f"{_METHOD}: nothing else can be served as it is")
    stored.only("quant_method", _METHOD, "nothing else can be served as it is")
    if not stored.has("quantization"):
        raise stored.error("quantization", "one of " + ", ".join(QUANTIZATIONS[1:]))
    return stored.choice("quantization", "", QUANTIZATIONS[1:])


def effective_quantization(asked: str, config: ModelConfig) -> str:
    """What is served when `asked` meets what the checkpoint's files hold already.

    `none` serves the files as they are. ValueError when `asked` cannot be had.
    """
    stored = config.quantization
    if stored != "none" and asked not in ("none", stored):
        raise ValueError(
            f"quantization={asked}: the checkpoint is quantised already; "
            f"allowed values are none, {stored}"
        )
    if asked == "int8" and not any(map(config.is_moe_layer, range(config.num_layers))):
        raise ValueError(
            "quantization=int8: no layer of this model has routed experts; "
            "allowed values are none, int8-all"
        )
    return asked if stored == "none" else stored
