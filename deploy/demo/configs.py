"""The nano models' config.json contents, in the published layout of each family."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from deploy.demo.tokenizer_build import CHAT_FORMATS, MAX_MODEL_LEN, padded_vocab

PHIMOE_ORIGINAL_MAX = 96


def _dbrx(vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "model_type": "", "rope_theta": 500000},
        "d_model": 96,
        "emb_pdrop": 0.0,
        "ffn_config": {
            "ffn_hidden_size": 80,
            "model_type": "",
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.02,
            "moe_normalize_expert_weights": 1.0,
            "moe_num_experts": 16,
            "moe_top_k": 4,
        },
        "initializer_range": 0.06,
        "max_seq_len": MAX_MODEL_LEN,
        "n_heads": 6,
        "n_layers": 4,
        "output_router_logits": False,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _phimoe(vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["PhiMoEForCausalLM"],
        "model_type": "phimoe",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.06,
        "input_jitter_noise": 0.01,
        "intermediate_size": 80,
        "lm_head_bias": True,
        "max_position_embeddings": MAX_MODEL_LEN,
        "num_attention_heads": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "original_max_position_embeddings": PHIMOE_ORIGINAL_MAX,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0, 1.1, 1.3, 1.7, 2.2, 3.0, 4.0, 5.3],
            "long_mscale": 1.15,
            "original_max_position_embeddings": PHIMOE_ORIGINAL_MAX,
            "short_factor": [1.0, 1.0, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25],
            "short_mscale": 1.05,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.01,
        "sliding_window": MAX_MODEL_LEN,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _jamba(vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "attention_dropout": 0.0,
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.06,
        "intermediate_size": 96,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_dt_rank": 4,
        "mamba_expand": 2,
        "mamba_proj_bias": False,
        "max_position_embeddings": MAX_MODEL_LEN,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_mamba_kernels": True,
        "vocab_size": vocab_size,
    }


_BUILDERS = {"nano-dbrx": _dbrx, "nano-phimoe": _phimoe, "nano-jamba": _jamba}


def published_config(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json for one nano model; DBRX keeps its token ids out, as published."""
    config = _BUILDERS[name](padded_vocab(tokenizer))
    if name != "nano-dbrx":
        chat = CHAT_FORMATS[name]
        config["bos_token_id"] = tokenizer.token_to_id(chat.bos)
        config["eos_token_id"] = tokenizer.token_to_id(chat.eos[0])
        config["pad_token_id"] = tokenizer.token_to_id(chat.pad)
    return config
