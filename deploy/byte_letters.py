"""The letters by which byte-level vocabularies spell bytes."""

from __future__ import annotations


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's printable letter of every byte (openai/gpt-2 `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _letters_of_bytes()
LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
