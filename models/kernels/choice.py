"""Which kernels a model instance computes with: chosen once, the same for all its workers.

A choice is a variant (or `auto`, `native`, `torch`) and behind it, each after a comma and a minus,
the kernels that PyTorch computes all the same: `auto,-attention`.
"""

from __future__ import annotations

import logging
import os

from models.kernels.variants import VARIANTS, KernelsUnavailable, Variant, load, supported_variants

log = logging.getLogger("conclave.kernels")

TORCH = "torch"
CHOICES = ("auto", "native", TORCH, *(variant.name for variant in VARIANTS))
VARIABLE = "CONCLAVE_KERNELS"

KERNELS = (
    *("linear", "experts", "gate", "attention", "rope"),
    *("convolution", "scan", "rms_norm", "layer_norm", "greedy"),
)
"""What can be taken out by itself: the names by which layers ask for a kernel."""


def parse_choice(choice: str, name: str = "kernels") -> tuple[str, frozenset[str]]:
    """What is asked for, and the kernels that are off. `name` is the option that a refusal names.

    Raises ValueError.
    """
    base, *taken_out = choice.split(",")
    off = frozenset(word.removeprefix("-") for word in taken_out)
    signed = all(word.startswith("-") for word in taken_out)
    if base not in CHOICES or not signed or not off <= set(KERNELS):
        raise ValueError(
            f"{name}={choice}: allowed values are {', '.join(CHOICES)}, "
            f"and behind one of them any of {', '.join(f',-{kernel}' for kernel in KERNELS)}"
        )
    return base, off


def join_choice(base: str, off: frozenset[str]) -> str:
    """The one spelling of a choice; where PyTorch computes everything nothing can be off."""
    if base == TORCH:
        return TORCH
    return ",".join([base, *(f"-{kernel}" for kernel in KERNELS if kernel in off)])


def resolve_kernels(choice: str = "auto") -> str:
    """What `choice` comes to on this machine: torch, or a variant that works here and what is off.

    `auto` is the environment variable CONCLAVE_KERNELS where it is set; else the best variant, or
    torch with one log line where there is none. Raises ValueError where another choice cannot be
    had.
    """
    if choice == "auto":
        choice = wanted_kernels()
    base, off = parse_choice(choice)
    if base == TORCH:
        return TORCH
    reason = "they are for x86-64 processors with AVX2 or better"
    for variant in _candidates(base):
        try:
            load(variant)
        except KernelsUnavailable as error:
            reason = f"{variant.name}: {error}"
        else:
            return join_choice(variant.name, off)
    if base != "auto":
        raise ValueError(f"kernels={choice}: native kernels cannot be used here: {reason}")
    log.warning("native kernels are not used, PyTorch computes instead: %s", reason)
    return TORCH


def wanted_kernels() -> str:
    """What the environment asks for; auto where it says nothing. Raises ValueError."""
    choice = os.environ.get(VARIABLE) or "auto"
    parse_choice(choice, VARIABLE)
    return choice


def backends(resolved: str) -> dict[str, str]:
    """What computes each kernel under a resolved choice: the name of a variant, or torch."""
    base, off = parse_choice(resolved)
    return {kernel: TORCH if kernel in off else base for kernel in KERNELS}


def _candidates(base: str) -> tuple[Variant, ...]:
    if base in ("auto", "native"):
        return supported_variants()
    return tuple(variant for variant in VARIANTS if variant.name == base)
