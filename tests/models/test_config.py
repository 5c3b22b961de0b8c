"""config.json: what is accepted, what is defaulted, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DbrxConfig, JambaConfig, PhimoeConfig

from models.dbrx import DbrxConfig as OurDbrx
from models.jamba import JambaConfig as OurJamba
from models.phimoe import PhimoeConfig as OurPhimoe
from models.registry import ConfigError, UnsupportedModel, load_config, parse_config

FACTORS = [1.0 + i for i in range(4)]
LONGROPE = {
    "type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "short_mscale": 1,
    "long_mscale": 1.5,
}
PHIMOE = {"model_type": "phimoe", "hidden_size": 32, "num_attention_heads": 4}


def dbrx(**keys: Any) -> OurDbrx:
    config = parse_config({"model_type": "dbrx", **keys})
    assert isinstance(config, OurDbrx)
    return config


def phimoe(**keys: Any) -> OurPhimoe:
    config = parse_config({**PHIMOE, "num_key_value_heads": 2, **keys})
    assert isinstance(config, OurPhimoe)
    return config


def jamba(**keys: Any) -> OurJamba:
    config = parse_config({"model_type": "jamba", **keys})
    assert isinstance(config, OurJamba)
    return config


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("DbrxForCausalLM", "dbrx"),
        ("PhiMoEForCausalLM", "phimoe"),
        ("PhimoeForCausalLM", "phimoe"),
        ("JambaForCausalLM", "jamba"),
    ],
)
def test_architectures(architecture: str, family: str) -> None:
    assert parse_config({"architectures": [architecture]}).family == family


@pytest.mark.parametrize(
    "raw",
    [
        {"architectures": ["DbrxForSequenceClassification"], "model_type": "dbrx"},
        {"architectures": ["JambaForSequenceClassification"], "model_type": "jamba"},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": "phi3"},
        {},
    ],
)
def test_other_models_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="must"):
        parse_config(raw)


def test_class_defaults_are_transformers() -> None:
    theirs = DbrxConfig(attn_config={"rope_theta": 10000.0})
    ours = dbrx()
    assert ours.hidden_size == theirs.d_model
    assert (ours.num_heads, ours.num_layers) == (theirs.n_heads, theirs.n_layers)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.max_position_embeddings == theirs.max_seq_len
    assert ours.num_kv_heads == theirs.attn_config.kv_n_heads
    assert (ours.clip_qkv, ours.rope_theta) == (None, 10000.0)
    ffn = theirs.ffn_config
    assert (ours.expert_width, ours.num_experts) == (ffn.ffn_hidden_size, ffn.moe_num_experts)
    assert (ours.top_k, ours.expert_weight_norm) == (ffn.moe_top_k, 1.0)
    assert ours.activation == ffn.ffn_act_fn["name"]

    phi, our_phi = PhimoeConfig(), parse_config({"model_type": "phimoe"})
    assert isinstance(our_phi, OurPhimoe)
    for name, key in {
        "hidden_size": "hidden_size", "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "expert_width": "intermediate_size",
        "num_experts": "num_local_experts", "norm_eps": "rms_norm_eps",
        "sliding_window": "sliding_window", "attention_bias": "attention_bias",
        "lm_head_bias": "lm_head_bias", "tied": "tie_word_embeddings",
        "router_jitter_noise": "router_jitter_noise",
        "max_position_embeddings": "max_position_embeddings",
    }.items():  # fmt: skip
        assert getattr(our_phi, name) == getattr(phi, key), key
    assert our_phi.rope_theta == phi.rope_parameters["rope_theta"] == 1e6
    assert our_phi.long_rope is None

    jam, our_jam = JambaConfig(), jamba()
    for name, key in {
        "hidden_size": "hidden_size", "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "expert_width": "intermediate_size",
        "num_experts": "num_experts", "top_k": "num_experts_per_tok",
        "norm_eps": "rms_norm_eps", "mamba_state": "mamba_d_state",
        "mamba_kernel": "mamba_d_conv", "mamba_rank": "mamba_dt_rank",
        "mamba_conv_bias": "mamba_conv_bias", "mamba_proj_bias": "mamba_proj_bias",
        "tied": "tie_word_embeddings", "max_position_embeddings": "max_position_embeddings",
    }.items():  # fmt: skip
        assert getattr(our_jam, name) == getattr(jam, key), key
    kinds = ["attention" if our_jam.is_attention_layer(i) else "mamba" for i in range(32)]
    assert kinds == jam.layers_block_type
    assert [our_jam.is_moe_layer(i) for i in range(32)] == [n > 1 for n in jam.layers_num_experts]


def test_published_dbrx() -> None:
    config = dbrx(
        d_model=6144, n_heads=48, n_layers=40, max_seq_len=32768, vocab_size=100352,
        attn_config={"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000, "model_type": ""},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4,
                    "moe_jitter_eps": 0, "uniform_expert_assignment": False},
        torch_dtype="bfloat16", tie_word_embeddings=False, router_aux_loss_coef=0.05,
    )  # fmt: skip
    assert (config.clip_qkv, config.rope_theta, config.dtype_name) == (8.0, 500000.0, "bfloat16")
    assert config.expert_weight_norm == 1.0
    assert config.layer_bytes(0, 1) == 88_190_976
    expert = sum(p.shape[0] * p.shape[1] for p in config.expert_tensors(0, 0).values())
    assert expert == 198_180_864


@pytest.mark.parametrize(
    ("geometry", "layer", "expert"),
    [
        ((6400, 32, 8, None), 42_035_200, 78_643_200),
        ((960, 32, 8, 128), 42_035_200, 11_796_480),
        ((448, 16, 4, 128), 21_060_608, 5_505_024),
    ],
    ids=["Phi-3.5-MoE", "Phi-mini-MoE", "Phi-tiny-MoE"],
)
def test_published_phimoe(geometry: tuple[Any, ...], layer: int, expert: int) -> None:
    width, heads, kv_heads, head_dim = geometry
    config = parse_config(
        {"architectures": ["PhiMoEForCausalLM"], "intermediate_size": width, "head_dim": head_dim,
         "num_attention_heads": heads, "num_key_value_heads": kv_heads, "attention_bias": True,
         "lm_head_bias": True, "hidden_dropout": 0.0, "expert_dropout": 0.0, "rope_scaling": None}
    )  # fmt: skip
    # The table counts the gate with the layer.
    assert config.layer_bytes(0, 1) == layer
    parts = config.expert_tensors(0, 0).values()
    assert sum(p.shape[0] * p.shape[1] for p in parts) == expert


def test_published_jamba() -> None:
    config = jamba(
        num_hidden_layers=72, hidden_size=8192, intermediate_size=24576, num_attention_heads=64,
        num_key_value_heads=8, mamba_dt_rank=512, n_ctx=262144, sliding_window=None,
        calc_logits_for_entire_prompt=False, mamba_inner_layernorms=True, num_logits_to_keep=1,
        use_mamba_kernels=True, torch_dtype="bfloat16", eos_token_id=[2, 518],
    )  # fmt: skip
    attention = [i for i in range(72) if config.is_attention_layer(i)]
    assert attention == [4, 12, 20, 28, 36, 44, 52, 60, 68]
    norms, router, dense = 2 * 8192, 16 * 8192, 3 * 8192 * 24576
    assert config.layer_bytes(4, 1) == 150_994_944 + norms + dense
    assert config.layer_bytes(1, 1) == 420_332_064 + norms + router


def test_dbrx_rope_base_precedence() -> None:
    top = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert dbrx(**top, attn_config={"rope_theta": 5}).rope_theta == 5.0
    assert dbrx(**top).rope_theta == 7.0
    assert dbrx().rope_theta == 10000.0


@pytest.mark.parametrize("value", [None, 0, 0.5, 8])
def test_dbrx_clip(value: float | None) -> None:
    assert dbrx(attn_config={"clip_qkv": value}).clip_qkv == value


@pytest.mark.parametrize("value", [None, 0, 1, 2.0])
def test_dbrx_weight_norm(value: float | None) -> None:
    config = dbrx(ffn_config={"moe_normalize_expert_weights": value})
    assert config.expert_weight_norm == value


def test_longrope_spellings() -> None:
    hub = phimoe(rope_scaling={**LONGROPE, "original_max_position_embeddings": 16}, rope_theta=9)
    assert hub.reprefill_length == 16
    assert hub.rope_theta == 9.0
    top = phimoe(rope_scaling=LONGROPE, original_max_position_embeddings=16, rope_theta=9)
    assert top == hub
    new = {**LONGROPE, "rope_type": "longrope", "rope_theta": 9.0}
    assert phimoe(rope_parameters={**new, "original_max_position_embeddings": 16}) == hub
    assert phimoe(rope_scaling={**LONGROPE, "type": "su"}, max_position_embeddings=99).long_rope
    absent = phimoe(rope_scaling=LONGROPE, max_position_embeddings=99)
    assert absent.reprefill_length == 99


def test_dtype_under_either_key() -> None:
    assert jamba(dtype="bfloat16").dtype_name == "bfloat16"
    assert jamba(torch_dtype="float16").dtype_name == "float16"
    assert jamba().dtype_name == "float32"


@pytest.mark.parametrize(("hidden", "rank"), [(64, 4), (72, 5), (4096, 256)])
def test_automatic_rank_rounds_up(hidden: int, rank: int) -> None:
    assert jamba(hidden_size=hidden, num_attention_heads=8, mamba_dt_rank="auto").mamba_rank == rank


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
    ],
)
def test_refusals_name_the_key(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert str(caught.value).startswith(f"{key} is ")
    assert "must be" in str(caught.value)


def test_load_config_reads_folder_or_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "jamba"}))
    assert load_config(tmp_path) == load_config(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_config(file)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        load_config(file)


def test_a_stage_names_what_it_was_not_given() -> None:
    import torch

    config = phimoe(num_hidden_layers=2, num_local_experts=2, intermediate_size=8, vocab_size=10)
    stage = config.build_stage(0, 1, torch.float32)
    assert not any(name.startswith("head.") for name in stage.tensors())
    weights = {name: torch.zeros(part.shape) for name, part in stage.tensors().items()}
    stage.load(weights)
    with pytest.raises(ValueError, match=r"layers\.0\.q is missing"):
        stage.load({n: t for n, t in weights.items() if n != "layers.0.q"})
    with pytest.raises(ValueError, match=r"layers\.0\.o has shape"):
        stage.load({**weights, "layers.0.o": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="surplus does not belong"):
        stage.load({**weights, "surplus": torch.zeros(1)})
