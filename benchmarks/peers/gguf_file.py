"""A safetensors checkpoint as a GGUF file in bfloat16. Runs in llama.cpp's own environment.

Source of the conventions: llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_DTYPES = {"F32": np.float32, "BF16": np.uint16}
NUM_SPECIAL = 3
NUM_BYTES = 256


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write `path` from config.json and model.safetensors of `folder`; `dtype` of the matrices."""
    raw = json.loads((folder / "config.json").read_text())
    family = raw["model_type"]
    writer: Any = gguf.GGUFWriter(path, family)
    _METADATA[family](writer, raw)
    _write_vocabulary(writer, raw["vocab_size"])
    num_layers = raw.get("n_layers") or raw["num_hidden_layers"]
    names = gguf.get_tensor_name_map(_ARCHITECTURES[family], num_layers)
    for name, values in _tensors(folder / "model.safetensors", raw):
        _write_tensor(writer, _gguf_name(names, name), values, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ARCHITECTURES = {
    "dbrx": gguf.MODEL_ARCH.DBRX,
    "phimoe": gguf.MODEL_ARCH.PHIMOE,
    "jamba": gguf.MODEL_ARCH.JAMBA,
}


def _dbrx(writer: Any, raw: dict[str, Any]) -> None:
    attention, ffn = raw["attn_config"], raw["ffn_config"]
    writer.add_block_count(raw["n_layers"])
    writer.add_context_length(raw["max_seq_len"])
    writer.add_embedding_length(raw["d_model"])
    writer.add_feed_forward_length(ffn["ffn_hidden_size"])
    writer.add_head_count(raw["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_expert_count(ffn["moe_num_experts"])
    writer.add_expert_used_count(ffn["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)


def _phimoe(writer: Any, raw: dict[str, Any]) -> None:
    _common(writer, raw)
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_rope_dimension_count(raw["hidden_size"] // raw["num_attention_heads"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_rope_scaling_orig_ctx_len(raw["max_position_embeddings"])
    writer.add_sliding_window(0)
    writer.add_expert_count(raw["num_local_experts"])


def _jamba(writer: Any, raw: dict[str, Any]) -> None:
    _common(writer, raw)
    period, offset = raw["attn_layer_period"], raw["attn_layer_offset"]
    heads = raw["num_key_value_heads"]
    layers = range(raw["num_hidden_layers"])
    writer.add_head_count_kv([heads if i % period == offset else 0 for i in layers])
    writer.add_ssm_conv_kernel(raw["mamba_d_conv"])
    writer.add_ssm_inner_size(raw["mamba_expand"] * raw["hidden_size"])
    writer.add_ssm_state_size(raw["mamba_d_state"])
    writer.add_ssm_time_step_rank(raw["mamba_dt_rank"])
    writer.add_expert_count(raw["num_experts"])


def _common(writer: Any, raw: dict[str, Any]) -> None:
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_expert_used_count(raw["num_experts_per_tok"])


_METADATA = {"dbrx": _dbrx, "phimoe": _phimoe, "jamba": _jamba}


def _write_vocabulary(writer: Any, size: int) -> None:
    """Bytes, so that any text has tokens, and ` wN` for every other id."""
    special = ["<unk>", "<s>", "</s>"]
    some_bytes = [f"<0x{byte:02X}>" for byte in range(NUM_BYTES)]
    words = [f"▁w{i}" for i in range(NUM_SPECIAL + NUM_BYTES, size)]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *some_bytes, *words])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * NUM_BYTES
        + [kinds.NORMAL] * len(words)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _tensors(path: Path, raw: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by the name that the name map knows; experts stacked [E, out, in]."""
    experts: dict[str, dict[int, np.ndarray]] = {}
    ffn = raw.get("ffn_config", {})
    for name, values in _stored(path):
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = values
        elif ".ffn.experts.mlp." in name:
            values = values.reshape(ffn["moe_num_experts"], ffn["ffn_hidden_size"], -1)
            yield name, values.transpose(0, 2, 1) if name.endswith("w2") else values
        elif name.endswith("A_log"):
            yield name, -np.exp(_as_float(values))
        else:
            yield name, values.squeeze(1) if name.endswith("conv1d.weight") else values
    for name, parts in experts.items():
        yield f"{name}.weight", np.stack([parts[i] for i in range(len(parts))])


def _stored(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor as it lies in the file; bfloat16 as uint16."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            shape = tuple(entry["shape"])
            offset = 8 + size + entry["data_offsets"][0]
            yield name, np.memmap(path, _DTYPES[entry["dtype"]], "r", offset, shape)


def _as_float(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def _gguf_name(names: Any, name: str) -> str:
    for suffix in (".weight", ".bias", ""):
        found = names.get_name(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if found is not None:
            bare = name.endswith(("A_log", ".D"))
            return f"{found}{suffix or ('' if bare else '.weight')}"
    raise ValueError(f"{name}: no such tensor in GGUF")


def _write_tensor(writer: Any, name: str, values: np.ndarray, dtype: str) -> None:
    """Vectors, gates and small recurrent parts in float32, as llama.cpp wants them."""
    small = values.ndim == 1 or "ffn_gate_inp" in name or "conv1d" in name or "ssm_a" in name
    if small or dtype == "float32":
        writer.add_tensor(name, np.ascontiguousarray(_as_float(values)))
        return
    stored = np.ascontiguousarray(values).view(np.uint8)
    writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
