"""Which activations are served, by Transformers' names; what they compute is in `layers`."""

from __future__ import annotations

ACTIVATION_NAMES = (
    *("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "sigmoid", "tanh"),
)
