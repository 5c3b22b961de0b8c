"""DBRX, case by case: defaults, tolerated keys, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, DbrxConfig, DbrxForCausalLM

from models.registry import ConfigError, UnsupportedModel, load_config, parse_config
from shards.checkpoint import CheckpointError, open_model
from shards.verify import verify
from tests.models.driver import tokens_of
from tests.parity.battery import assert_everywhere
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.remedies import drop_keys, edit_config, load, logits_of
from tests.tiny import write_tiny

SEQUENCES = [tokens_of(9, 22), tokens_of(10, 1), tokens_of(11, 6)]


@case(11, "DBRX", "attn_config missing: no clamp, one kv head, base 10000")
def test_no_attn_config(
    tmp_path: Path, default_rope_base: Any, rope_base_from_attn_config: Any, clip_nothing: Any
) -> None:
    defaults = {"clip_qkv": None, "kv_n_heads": 1, "rope_theta": 10000.0}
    folder = write_tiny("dbrx", tmp_path, n_layers=2, attn_config=defaults)
    drop_keys(folder, "attn_config", "rope_parameters", "num_key_value_heads")
    model = clip_nothing(rope_base_from_attn_config(default_rope_base(folder)))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(11, "DBRX", "ffn_config missing: four silu experts of width 3584, one per token")
def test_no_ffn_config(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    defaults = {"ffn_hidden_size": 3584, "moe_num_experts": 4, "moe_top_k": 1}
    folder = write_tiny("dbrx", tmp_path, n_layers=2, ffn_config=defaults)
    drop_keys(folder, "ffn_config")
    model = rope_base_from_attn_config(load(folder))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(11, "DBRX", "no rope_theta anywhere: base 10000")
def test_no_rope_theta(
    tmp_path: Path, default_rope_base: Any, rope_base_from_attn_config: Any
) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2)
    drop_keys(folder, "attn_config.rope_theta", "rope_parameters")
    model = rope_base_from_attn_config(default_rope_base(folder))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(11, "DBRX", "no sizes at all: Transformers' class defaults")
def test_no_sizes() -> None:
    config = parse_config({"model_type": "dbrx"})
    with torch.device("meta"):
        theirs = DbrxForCausalLM(DbrxConfig(attn_config={"rope_theta": 10000.0}))
    assert config.num_layers == theirs.config.n_layers
    assert config.max_position_embeddings == theirs.config.max_seq_len
    assert config.num_experts == theirs.config.ffn_config.moe_num_experts
    assert config.top_k == theirs.config.ffn_config.moe_top_k
    assert config.aux_loss_coef == theirs.config.ffn_config.moe_loss_weight
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    slices = list(config.build_stage(0, config.num_layers, torch.float32).tensors().values())
    assert {s.sources[0].name: s.shape for s in slices} == {
        name: shape for name, shape in shapes.items() if ".experts." not in name
    }
    last = config.num_experts - 1
    for part in config.expert_tensors(config.num_layers - 1, last).values():
        source = part.sources[0]
        assert (source.stop, 2048) == shapes[source.name]


# The published config.json, at a tiny size, with keys that other revisions hold.
HUB_CONFIG: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 2, "kv_n_heads": 2, "model_type": "", "rope_theta": 500000},
    "auto_map": {
        "AutoConfig": "configuration_dbrx.DbrxConfig",
        "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM",
    },
    "d_model": 64,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 48,
        "model_type": "",
        "moe_jitter_eps": 0.01,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "uniform_expert_assignment": False,
        "an_unknown_key": [1, 2],
    },
    "initializer_range": 0.02,
    "max_seq_len": 256,
    "model_type": "dbrx",
    "n_heads": 4,
    "n_layers": 2,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 97,
    "another_unknown_key": "x",
}


@case(11, "DBRX", "the hub's own config.json; unknown keys are tolerated and named")
def test_hub_config(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2)
    drop_keys(folder, *_top_level_keys(folder))
    edit_config(folder, **HUB_CONFIG)
    model = rope_base_from_attn_config(load(folder))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))
    (note,) = load_config(folder).notes
    assert note.endswith("without effect: another_unknown_key, ffn_config.an_unknown_key")


def _top_level_keys(folder: Path) -> list[str]:
    return list(json.loads((folder / "config.json").read_text()))


@case(12, "DBRX", "tie_word_embeddings is refused, as by Transformers")
def test_tied_embeddings(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1)
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(StrictDataclassError, match="tie_word_embeddings is not supported"):
        load(folder)
    with pytest.raises(ConfigError, match="tie_word_embeddings is True, but must be false"):
        load_config(folder)


@case(13, "DBRX", "a norm's bias is an unexpected tensor")
def test_norm_bias(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1)
    name = "transformer.blocks.0.norm_attn_norm.norm_1.bias"
    with tensors_of(folder) as tensors:
        tensors[name] = torch.ones(64)
    with pytest.raises(CheckpointError, match=f"unexpected tensors: {name}"):
        verify(*open_model(folder))


@case(18, "DBRX", "sequence classification is refused by name, as by Transformers")
def test_classification(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    edit_config(folder, architectures=["DbrxForSequenceClassification"])
    with pytest.raises(
        UnsupportedModel,
        match="DbrxForSequenceClassification, but DBRX has no classification head: "
        "it must be DbrxForCausalLM",
    ):
        load_config(folder)


@case(18, "DBRX", "a classification head in the files is refused by name")
def test_classification_head(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1)
    with tensors_of(folder) as tensors:
        tensors["score.weight"] = torch.ones(2, 64)
    with pytest.raises(ConfigError, match=r"score\.weight: DBRX has no classification head"):
        open_model(folder)
