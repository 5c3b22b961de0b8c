"""Which kernels compute, and why not others."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from models.kernels.choice import TORCH, join_choice, parse_choice, wanted_kernels

if TYPE_CHECKING:
    from models.interface import ModelConfig

ATTENTION_ALIASES = {"eager": "torch", "sdpa": "torch", "flash_attention_2": "flash_attn"}
"""Transformers' names of attention implementations, and ours."""

_BACKEND_KERNELS = {
    "attention_backend": frozenset({"attention"}),
    "mamba_backend": frozenset({"convolution", "scan"}),
}

_MAMBA_PACKAGES = ("mamba_ssm", "causal_conv1d")


def missing_for_mamba_ssm() -> str:
    """What the CUDA kernels of `mamba_ssm` lack here, in words."""
    absent = [package for package in _MAMBA_PACKAGES if find_spec(package) is None]
    reasons = [f"{' and '.join(absent)} cannot be imported"] if absent else []
    return " and ".join([*reasons, "this version computes on CPUs only"])


def kernel_choice(kernels: str, attention_backend: str, mamba_backend: str) -> str:
    """One choice out of three options and the environment. Raises ValueError.

    `torch` as a backend takes its kernels out, `native` insists on them.
    """
    base, off = parse_choice(wanted_kernels() if kernels == "auto" else kernels)
    wanted = {"attention_backend": attention_backend, "mamba_backend": mamba_backend}
    for option, value in wanted.items():
        needed = _BACKEND_KERNELS[option]
        if value == "torch":
            off |= needed
        elif value == "native":
            if base == TORCH or off & needed:
                given = ",".join([base, *(f"-{kernel}" for kernel in sorted(off))])
                raise ValueError(
                    f"{option}=native: allowed values are auto, torch with kernels={given}"
                )
            base = "native" if base == "auto" else base
    return join_choice(base, off)


def backend_warnings(config: ModelConfig) -> tuple[str, ...]:
    """Which backend runs instead of one that the checkpoint asks for, and why."""
    from models.jamba import JambaConfig

    if not (isinstance(config, JambaConfig) and config.use_mamba_kernels):
        return ()
    return (
        "use_mamba_kernels is true, but the mamba backend is not mamba_ssm, because "
        f"{missing_for_mamba_ssm()}",
    )
