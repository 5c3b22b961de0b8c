"""config.json: what is accepted, what is defaulted, and what is refused with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
from transformers import DbrxConfig, JambaConfig, PhimoeConfig

from models.activation_names import ACTIVATION_NAMES
from models.dbrx import DbrxConfig as OurDbrx
from models.interface import ModelConfig
from models.jamba import JambaConfig as OurJamba
from models.layers.activation import ACTIVATIONS
from models.phimoe import PhimoeConfig as OurPhimoe
from models.registry import ConfigError, load_config, parse_config

FACTORS = [1.0 + i for i in range(4)]
LONGROPE = {
    "type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "short_mscale": 1,
    "long_mscale": 1.5,
}
PHIMOE = {"model_type": "phimoe", "hidden_size": 32, "num_attention_heads": 4}


def _layer_parameters(config: ModelConfig, layer_idx: int) -> int:
    return sum(prod(part.shape) for part in config.layer_tensors(layer_idx).values())


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
        ("PhiMoEForSequenceClassification", "phimoe"),
        ("PhimoeForSequenceClassification", "phimoe"),
        ("JambaForSequenceClassification", "jamba"),
    ],
)
def test_architectures(architecture: str, family: str) -> None:
    assert parse_config({"architectures": [architecture]}).family == family


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
    assert ours.aux_loss_coef == ffn.moe_loss_weight

    phi, our_phi = PhimoeConfig(), parse_config({"model_type": "phimoe"})
    assert isinstance(our_phi, OurPhimoe)
    for name, key in {
        "hidden_size": "hidden_size", "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "expert_width": "intermediate_size",
        "num_experts": "num_local_experts", "norm_eps": "rms_norm_eps",
        "sliding_window": "sliding_window", "attention_bias": "attention_bias",
        "aux_loss_coef": "router_aux_loss_coef", "top_k": "num_experts_per_tok",
        "router_jitter_noise": "router_jitter_noise",
        "max_position_embeddings": "max_position_embeddings",
    }.items():  # fmt: skip
        assert getattr(our_phi, name) == getattr(phi, key), key
    assert our_phi.rope_theta == phi.rope_parameters["rope_theta"] == 1e6
    assert our_phi.long_rope is None
    assert our_phi.ending.tied is phi.tie_word_embeddings
    assert our_phi.ending.lm_head_bias is phi.lm_head_bias
    assert our_phi.ending.labelling.labels == tuple(phi.id2label.values())
    assert our_phi.ending.labelling.pad_token_id == phi.pad_token_id

    jam, our_jam = JambaConfig(), jamba()
    for name, key in {
        "hidden_size": "hidden_size", "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "expert_width": "intermediate_size",
        "num_experts": "num_experts", "top_k": "num_experts_per_tok",
        "norm_eps": "rms_norm_eps", "mamba_state": "mamba_d_state",
        "mamba_kernel": "mamba_d_conv", "mamba_rank": "mamba_dt_rank",
        "mamba_conv_bias": "mamba_conv_bias", "mamba_proj_bias": "mamba_proj_bias",
        "use_mamba_kernels": "use_mamba_kernels", "aux_loss_coef": "router_aux_loss_coef",
        "max_position_embeddings": "max_position_embeddings",
    }.items():  # fmt: skip
        assert getattr(our_jam, name) == getattr(jam, key), key
    assert our_jam.ending.tied is jam.tie_word_embeddings
    assert our_jam.ending.labelling.pad_token_id == jam.pad_token_id
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
        architectures=["DbrxForCausalLM"], emb_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        auto_map={"AutoConfig": "configuration_dbrx.DbrxConfig"}, initializer_range=0.02,
        use_cache=True, transformers_version="4.38.2",
    )  # fmt: skip
    assert config.notes == ()
    assert config.aux_loss_coef == 0.01
    assert (config.clip_qkv, config.rope_theta, config.dtype_name) == (8.0, 500000.0, "bfloat16")
    assert config.expert_weight_norm == 1.0
    assert _layer_parameters(config, 0) == 88_190_976
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
         "lm_head_bias": True, "hidden_dropout": 0.0, "expert_dropout": 0.0, "rope_scaling": None,
         "auto_map": {"AutoConfig": "configuration_slimmoe.PhiMoEConfig"}, "bos_token_id": 1,
         "eos_token_id": 32000, "input_jitter_noise": 0.01, "attention_dropout": 0.0,
         "original_max_position_embeddings": 4096, "sliding_window": 2047}
    )  # fmt: skip
    assert config.notes == ()
    # The table counts the gate with the layer.
    assert _layer_parameters(config, 0) == layer
    parts = config.expert_tensors(0, 0).values()
    assert sum(p.shape[0] * p.shape[1] for p in parts) == expert


def test_published_jamba() -> None:
    config = jamba(
        num_hidden_layers=72, hidden_size=8192, intermediate_size=24576, num_attention_heads=64,
        num_key_value_heads=8, mamba_dt_rank=512, n_ctx=262144, sliding_window=None,
        calc_logits_for_entire_prompt=False, mamba_inner_layernorms=True, num_logits_to_keep=1,
        use_mamba_kernels=True, torch_dtype="bfloat16", eos_token_id=[2, 518],
        auto_map={}, use_mambapy=False, use_associative_scan=True, output_router_logits=False,
    )  # fmt: skip
    assert config.notes == ()
    attention = [i for i in range(72) if config.is_attention_layer(i)]
    assert attention == [4, 12, 20, 28, 36, 44, 52, 60, 68]
    norms, router, dense = 2 * 8192, 16 * 8192, 3 * 8192 * 24576
    assert _layer_parameters(config, 4) == 150_994_944 + norms + dense
    assert _layer_parameters(config, 1) == 420_332_064 + norms + router


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
    both = {**LONGROPE, "original_max_position_embeddings": 16}
    assert phimoe(rope_scaling=both, original_max_position_embeddings=20, rope_theta=9) == hub
    assert phimoe(rope_scaling=both, rope_theta=9, rope_parameters={}) == hub
    assert phimoe(rope_scaling={}, rope_parameters={**both, "rope_theta": 9.0}) == hub
    absent = phimoe(rope_scaling=LONGROPE, max_position_embeddings=99)
    assert absent.reprefill_length == 99


def test_dtype_under_either_key() -> None:
    assert jamba(dtype="bfloat16").dtype_name == "bfloat16"
    assert jamba(torch_dtype="float16").dtype_name == "float16"
    assert jamba().dtype_name == "float32"
    assert jamba(dtype="bfloat16", torch_dtype="float16").dtype_name == "bfloat16"


@pytest.mark.parametrize(("hidden", "rank"), [(64, 4), (72, 5), (4096, 256)])
def test_automatic_rank_rounds_up(hidden: int, rank: int) -> None:
    assert jamba(hidden_size=hidden, num_attention_heads=8, mamba_dt_rank="auto").mamba_rank == rank


def test_other_spellings() -> None:
    assert jamba(num_local_experts=8).num_experts == 8
    assert jamba(num_local_experts=8, num_experts=8).num_experts == 8
    assert phimoe(num_experts=4).num_experts == 4
    aliased = dbrx(hidden_size=64, num_attention_heads=4, num_hidden_layers=3)
    assert (aliased.hidden_size, aliased.num_heads, aliased.num_layers) == (64, 4, 3)
    assert dbrx(max_position_embeddings=77).max_position_embeddings == 77
    assert dbrx(num_key_value_heads=2).notes == ()


def test_keys_that_nobody_knows_are_named() -> None:
    (note,) = dbrx(frobnicate=1, ffn_config={"ffn_act_fn": {"name": "gelu", "approx": 1}}).notes
    assert note.endswith("without effect: ffn_config.ffn_act_fn.approx, frobnicate")
    (note,) = jamba(**{f"key_{i:02}": i for i in range(23)}).notes
    assert note.endswith("key_18, key_19 and 3 more")
    unused = {"rope_type": "default"}
    (note,) = phimoe(rope_scaling=LONGROPE, rope_parameters=unused).notes
    assert note.endswith("without effect: rope_parameters")


@pytest.mark.parametrize("saved", [DbrxConfig, PhimoeConfig, JambaConfig])
def test_what_transformers_saves_is_all_known(saved: Any, tmp_path: Path) -> None:
    attn = {"attn_config": {"rope_theta": 10000.0}} if saved is DbrxConfig else {}
    saved(**attn, attn_implementation="eager").save_pretrained(tmp_path)
    assert load_config(tmp_path).notes == ()
    everything = saved(**attn).to_dict()
    everything["architectures"] = None
    assert parse_config(json.loads(json.dumps(everything))).notes == ()


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
    with pytest.raises(ValueError, match=r"layers\.0\.qkv is missing"):
        stage.load({n: t for n, t in weights.items() if n != "layers.0.qkv"})
    with pytest.raises(ValueError, match=r"layers\.0\.o has shape"):
        stage.load({**weights, "layers.0.o": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="surplus does not belong"):
        stage.load({**weights, "surplus": torch.zeros(1)})


def test_reading_a_configuration_needs_no_torch() -> None:
    program = """
import sys
from models.registry import parse_config
for family in ("dbrx", "phimoe", "jamba"):
    config = parse_config({"model_type": family})
    config.layer_tensors(0), config.expert_tensors(0, 0), config.head_tensors()
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_activation_that_is_named_is_there() -> None:
    assert set(ACTIVATION_NAMES) == ACTIVATIONS.keys()
