"""Which kernels compute, and why not others."""

from __future__ import annotations

from importlib.util import find_spec

ATTENTION_ALIASES = {"eager": "torch", "sdpa": "torch", "flash_attention_2": "flash_attn"}
"""Transformers' names of attention implementations, and ours."""

_MAMBA_PACKAGES = ("mamba_ssm", "causal_conv1d")


def missing_for_mamba_ssm() -> str:
    """What the CUDA kernels of `mamba_ssm` lack here, in words."""
    absent = [package for package in _MAMBA_PACKAGES if find_spec(package) is None]
    reasons = [f"{' and '.join(absent)} cannot be imported"] if absent else []
    return " and ".join([*reasons, "this version computes on CPUs only"])
