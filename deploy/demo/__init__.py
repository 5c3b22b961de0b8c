"""The bundled nano checkpoints: small, trained, and shaped like the three published families."""

from __future__ import annotations

from pathlib import Path

NANO_MODELS = ("nano-dbrx", "nano-phimoe", "nano-jamba")

_CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


def nano_checkpoint(name: str) -> Path:
    """Return the folder of a bundled checkpoint, in Hugging Face layout."""
    if name not in NANO_MODELS:
        raise ValueError(f"unknown nano model {name!r}; choose one of {', '.join(NANO_MODELS)}")
    return _CHECKPOINTS / name


__all__ = ["NANO_MODELS", "nano_checkpoint"]
