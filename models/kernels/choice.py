"""Which kernels a model instance computes with: chosen once, the same for all its workers."""

from __future__ import annotations

import logging
import os

from models.kernels.variants import VARIANTS, KernelsUnavailable, Variant, load, supported_variants

log = logging.getLogger("conclave.kernels")

TORCH = "torch"
CHOICES = ("auto", "native", TORCH, *(variant.name for variant in VARIANTS))
VARIABLE = "CONCLAVE_KERNELS"


def resolve_kernels(choice: str = "auto") -> str:
    """What `choice` comes to on this machine: torch, or the name of a variant that works here.

    `auto` is the environment variable CONCLAVE_KERNELS where it is set; else the best variant, or
    torch with one log line where there is none. Raises ValueError where another choice cannot be
    had.
    """
    if choice == "auto":
        choice = wanted_kernels()
    if choice not in CHOICES:
        raise ValueError(_refusal("kernels", choice))
    if choice == TORCH:
        return TORCH
    reason = "they are for x86-64 processors with AVX2 or better"
    for variant in _candidates(choice):
        try:
            load(variant)
        except KernelsUnavailable as error:
            reason = f"{variant.name}: {error}"
        else:
            return variant.name
    if choice != "auto":
        raise ValueError(f"kernels={choice}: native kernels cannot be used here: {reason}")
    log.warning("native kernels are not used, PyTorch computes instead: %s", reason)
    return TORCH


def wanted_kernels() -> str:
    """What the environment asks for; auto where it says nothing. Raises ValueError."""
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(_refusal(VARIABLE, choice))
    return choice


def _refusal(name: str, choice: str) -> str:
    return f"{name}={choice}: allowed values are {', '.join(CHOICES)}"


def _candidates(choice: str) -> tuple[Variant, ...]:
    if choice in ("auto", "native"):
        return supported_variants()
    return tuple(variant for variant in VARIANTS if variant.name == choice)
