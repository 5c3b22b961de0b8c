"""What int8 must mean, worked out from a checkpoint's hub names alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Hub names and, for each, the dimension that runs over output channels.
_EXPERTS = {
    r"\.ffn\.experts\.mlp\.(w1|v1)$": 0,
    r"\.ffn\.experts\.mlp\.w2$": 1,  # stored [E * F, D]: outputs are columns
    r"\.block_sparse_moe\.experts\.\d+\.w[123]\.weight$": 0,
    r"\.feed_forward\.experts\.\d+\.(gate|up|down)_proj\.weight$": 0,
}
_DENSE = {
    r"\.attn\.(Wqkv|out_proj)\.weight$": 0,
    r"\.self_attn\.[qkvo]_proj\.weight$": 0,
    r"\.feed_forward\.(gate|up|down)_proj\.weight$": 0,
}


def output_dim(name: str, quantization: str) -> int | None:
    """Dimension of the output channels of a tensor that is quantised; None for the others."""
    patterns = {**_EXPERTS, **_DENSE} if quantization == "int8-all" else _EXPERTS
    return next((dim for pattern, dim in patterns.items() if re.search(pattern, name)), None)


def round_trip(name: str, tensor: Tensor, dim: int, num_experts: int) -> Tensor:
    """The float32 values that int8 stands for, one scale per output channel."""
    wide, inputs = tensor.double(), 1 - dim
    if name.endswith("mlp.w2"):  # every expert has channels of its own
        wide, inputs = wide.view(num_experts, -1, tensor.shape[-1]), 1
    scale = wide.abs().amax(dim=inputs, keepdim=True) / 127
    return (torch.round(wide / scale) * scale).view(tensor.shape).float()


def spread_channels(folder: Path) -> None:
    """Give output channels very different magnitudes, so that a wrong axis cannot pass."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        dim = output_dim(name, "int8-all")
        if dim is not None:
            gains = torch.logspace(-1, 0.3, tensor.shape[dim]).unsqueeze(1 - dim)
            tensors[name] = (tensor * gains).to(tensor.dtype).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def write_round_trip(folder: Path, target: Path, quantization: str) -> Path:
    """A full-precision checkpoint whose values are those that int8 stands for."""
    target.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    experts = raw.get("ffn_config", {}).get("moe_num_experts", 0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        dim = output_dim(name, quantization)
        if dim is not None:
            tensors[name] = round_trip(name, tensor, dim, experts)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(raw))
    return target
