"""config.json: what cannot be served is refused, by the key's name and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DbrxConfig, JambaConfig, PhimoeConfig

from models.registry import ConfigError, UnsupportedModel, parse_config

FACTORS = [1.0 + i for i in range(4)]
LONGROPE = {
    "type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "short_mscale": 1,
    "long_mscale": 1.5,
}
PHIMOE = {"model_type": "phimoe", "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "raw",
    [
        {"architectures": ["DbrxForSequenceClassification"], "model_type": "dbrx"},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["JambaForCausalLM", "LlamaForCausalLM"]},
        {"architectures": ["JambaForCausalLM", "PhimoeForCausalLM"]},
        {"architectures": ["JambaForCausalLM"], "model_type": "phi3"},
        {"architectures": ["JambaModel"]},
        {"architectures": "JambaForCausalLM"},
        {"architectures": [["JambaForCausalLM"]]},
        {"model_type": ["jamba"]},
        {"model_type": "phi3"},
        {},
    ],
)
def test_other_models_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="must"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"model_type": "dbrx", "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"model_type": "dbrx", "n_heads": 3}, "d_model"),
        ({"model_type": "dbrx", "attn_config": {"kv_n_heads": 3}}, "attn_config.kv_n_heads"),
        ({"model_type": "dbrx", "attn_config": {"clip_qkv": "8"}}, "attn_config.clip_qkv"),
        ({"model_type": "dbrx", "ffn_config": {"moe_top_k": 5}}, "ffn_config.moe_top_k"),
        ({"model_type": "dbrx", "ffn_config": 3}, "ffn_config"),
        (
            {"model_type": "dbrx", "ffn_config": {"ffn_act_fn": {"name": "mish"}}},
            "ffn_config.ffn_act_fn.name",
        ),
        (
            {"model_type": "dbrx", "ffn_config": {"moe_normalize_expert_weights": -1}},
            "ffn_config.moe_normalize_expert_weights",
        ),
        ({**PHIMOE, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({**PHIMOE, "num_key_value_heads": 2, "num_experts_per_tok": 1}, "num_experts_per_tok"),
        ({**PHIMOE, "num_key_value_heads": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({**PHIMOE, "num_key_value_heads": 2, "num_local_experts": 1}, "num_local_experts"),
        ({**PHIMOE, "num_key_value_heads": 2, "sliding_window": 0}, "sliding_window"),
        (
            {**PHIMOE, "num_key_value_heads": 2, "rope_scaling": {"type": "yarn"}},
            "rope_scaling.type",
        ),
        (
            {
                **PHIMOE,
                "num_key_value_heads": 2,
                "rope_scaling": {**LONGROPE, "short_mscale": None},
            },
            "rope_scaling.short_mscale",
        ),
        (
            {**PHIMOE, "num_key_value_heads": 2, "rope_scaling": {**LONGROPE, "long_factor": [1]}},
            "rope_scaling.long_factor",
        ),
        ({"model_type": "jamba", "attn_layer_offset": 8}, "attn_layer_offset"),
        (
            {"model_type": "jamba", "attn_layer_offset": 5, "attn_layer_period": 5},
            "attn_layer_offset",
        ),
        ({"model_type": "jamba", "expert_layer_offset": 2}, "expert_layer_offset"),
        ({"model_type": "jamba", "hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "jamba", "mamba_dt_rank": "large"}, "mamba_dt_rank"),
        ({"model_type": "jamba", "num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"model_type": "jamba", "torch_dtype": "float64"}, "torch_dtype"),
        ({"model_type": "jamba", "hidden_size": 64.5}, "hidden_size"),
        ({"model_type": "jamba", "hidden_size": float("inf")}, "hidden_size"),
        ({"model_type": "jamba", "dtype": "bf16"}, "dtype"),
        ({"model_type": "jamba", "dtype": "bfloat16", "torch_dtype": "half"}, "torch_dtype"),
        ({"model_type": "jamba", "mamba_inner_layernorms": False}, "mamba_inner_layernorms"),
        ({"model_type": "jamba", "sliding_window": 512}, "sliding_window"),
        ({"model_type": "jamba", "num_experts": 4, "num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "jamba", "is_causal": False}, "is_causal"),
        ({"model_type": "jamba", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "jamba", "pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"model_type": "jamba", "per_layer_config": {"0": {}}}, "per_layer_config"),
        (
            {"model_type": "jamba", "quantization_config": {"quant_method": "gptq"}},
            "quantization_config.quant_method",
        ),
        ({"model_type": "jamba", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**PHIMOE, "num_key_value_heads": 2, "num_experts": 1}, "num_experts"),
        ({**PHIMOE, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}, "partial_rotary"),
        (
            {**PHIMOE, "num_key_value_heads": 2, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling.type",
        ),
        (
            {**PHIMOE, "num_key_value_heads": 2, "rope_scaling": {**LONGROPE, "rope_type": "su"}},
            "rope_scaling.type",
        ),
        ({**PHIMOE, "num_key_value_heads": 2, "rope_theta": 0}, "rope_theta"),
        (
            {"model_type": "dbrx", "rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.rope_type",
        ),
        ({"model_type": "dbrx", "rope_scaling": {"type": "linear"}}, "rope_scaling.type"),
        ({"model_type": "dbrx", "d_model": 64, "hidden_size": 32}, "hidden_size"),
        ({"model_type": "dbrx", "head_dim": 64}, "head_dim"),
        (
            {"model_type": "dbrx", "ffn_config": {"uniform_expert_assignment": True}},
            "ffn_config.uniform_expert_assignment",
        ),
    ],
)
def test_refusals_name_the_key(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert str(caught.value).startswith(key)
    assert " is " in str(caught.value)
    assert "must be" in str(caught.value)


@pytest.mark.parametrize("size", [2**40 + 1, 1e300, 10**400])
def test_a_size_beyond_all_bounds_is_told_the_bound(size: float) -> None:
    with pytest.raises(
        ConfigError, match=r"^hidden_size is .* at least 1 and at most 1099511627776"
    ):
        parse_config({"model_type": "jamba", "hidden_size": size})


SAVED: dict[str, dict[str, Any]] = {
    "dbrx": DbrxConfig(attn_config={"rope_theta": 1e4}).to_dict(),
    "phimoe": PhimoeConfig(
        rope_parameters={**LONGROPE, "rope_type": "longrope"}, head_dim=8
    ).to_dict(),
    "jamba": JambaConfig().to_dict(),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, 1, -1, 10**25, 10**400]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SAVED)), st.data())
def test_any_value_is_either_served_or_refused_by_name(family: str, data: st.DataObject) -> None:
    raw = json.loads(json.dumps({**SAVED[family], "dtype": None, "architectures": None}))
    sections = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    section = data.draw(st.sampled_from(sections))
    key = data.draw(st.sampled_from(sorted(section) or ["x"]))
    section[key] = data.draw(JSON)
    refused = None
    try:
        with torch.device("meta"):
            parse_config(raw).build_stage(0, 1, torch.float32).tensors()
    except ConfigError as error:
        refused = str(error)
    # A nested value may also be refused by the name of its section.
    assert refused is None or section is not raw or key in refused
    assert len(refused or "") < 500
