"""Tiny PhiMoE checkpoints with a classification head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from tests.parity.checkpoints import tensors_of
from tests.parity.remedies import drop_keys, edit_config
from tests.tiny import write_tiny

PAD = 5
"""The padding token of these checkpoints, where they have one."""
ORIGINAL = 16
"""Their original context, beyond which LongRoPE's long regime begins."""
HIDDEN = 64


def write_classifier(
    folder: Path, num_labels: int, *, keep_lm_head: bool = False, **keys: Any
) -> Path:
    """A tiny PhiMoE with a random score head, as PhimoeForSequenceClassification saves it."""
    rope = {"original_max_position_embeddings": ORIGINAL}
    write_tiny("phimoe", folder, num_hidden_layers=2, rope_parameters=rope)
    noise = torch.randn(num_labels, HIDDEN, generator=torch.Generator().manual_seed(num_labels))
    with tensors_of(folder) as tensors:
        tensors["score.weight"] = 0.3 * noise
        if not keep_lm_head:
            del tensors["lm_head.weight"], tensors["lm_head.bias"]
    if not keep_lm_head:
        edit_config(folder, architectures=["PhimoeForSequenceClassification"])
        drop_keys(folder, "lm_head_bias")
    names = {str(i): f"label {i}" for i in range(num_labels)}
    edit_config(folder, id2label=names, label2id={v: int(k) for k, v in names.items()}, **keys)
    return folder


def load_classifier(folder: Path) -> Any:
    """Transformers' own classifier; nothing of it may be missing from the files."""
    model, found = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    return model.eval()


def free_of_padding(tokens: list[int]) -> list[int]:
    """The same without the padding token."""
    return [token + 1 if token == PAD else token for token in tokens]
