"""The other layouts in which a checkpoint's tensors come."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Make `tensors` the folder's only ones, in a single file."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    kept = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def fuse(folder: Path) -> None:
    """Transformers 5's names in memory, experts stacked, instead of the hub's."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_tensors(folder, model.state_dict())
    assert any("gate_up_proj" in name for name in model.state_dict())


def split_dbrx_experts(folder: Path, num_experts: int = 4) -> None:
    """mlx's layout of DBRX: one matrix per expert, w2 in the other orientation."""
    tensors = read_tensors(folder)
    for stacked in [name for name in tensors if ".experts.mlp." in name]:
        for expert, matrix in enumerate(tensors.pop(stacked).chunk(num_experts)):
            name = stacked.replace(".mlp.", f".{expert}.") + ".weight"
            tensors[name] = matrix.t() if ".w2." in name else matrix
    write_tensors(folder, tensors)
