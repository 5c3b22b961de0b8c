"""Text from a checkpoint, made fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with its control characters, lone surrogates and line breaks spelt as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
