"""Where JSON in an answer's text ends: nothing that stands inside it is an answer of its own."""

from __future__ import annotations

import re

_STRING_STOP = re.compile(r'["\\]')
_WORD = re.compile(r"[-+.\w]+")
_SPACES = re.compile(r"\s+")
_CLOSERS = {"{": "}", "[": "]"}


class JsonOutline:
    """Follows an object or a list that arrives in pieces, for as long as it could be JSON.

    Loosely, as models write: any word is a value, strings may hold line breaks, and a comma may
    stand before a closing bracket.
    """

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._wants = "item"
        """What may come next: a key, a colon, a value, an item of a list, or what follows one."""
        self._in_string = self._escaped = False
        self.done = False
        """Whether it has ended, or was no JSON after all."""

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to it."""
        at = 0
        while at < len(text) and not self.done:
            if self._in_string:
                at = self._string(text, at)
            elif (spaces := _SPACES.match(text, at)) is not None:
                at = spaces.end()
                self._wants = "next" if self._wants == "word" else self._wants
            else:
                at = self._take(text, at)
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        found = _STRING_STOP.search(text, at)
        if found is None:
            return len(text)
        self._escaped = found[0] == "\\"
        self._in_string = self._escaped
        return found.end()

    def _take(self, text: str, at: int) -> int:
        """One character outside of strings, or a word."""
        char, wants = text[at], self._wants
        if wants in ("value", "item", "word") and (word := _WORD.match(text, at)) is not None:
            self._wants = "word"  # which the next piece may go on with
            return word.end()
        if wants == "word":
            wants = "next"
        if char == '"' and wants in ("key", "value", "item"):
            self._in_string = True
            self._wants = "colon" if wants == "key" else "next"
        elif char == ":" and wants == "colon":
            self._wants = "value"
        elif char in _CLOSERS and wants in ("value", "item"):
            self._closers.append(_CLOSERS[char])
            self._wants = "key" if char == "{" else "item"
        elif char == "," and wants == "next":
            self._wants = "key" if self._closers[-1] == "}" else "item"
        elif wants in ("key", "item", "next") and char == self._closers[-1]:
            self._closers.pop()
            self._wants = "next"
            self.done = not self._closers
        else:
            self.done = True
            return at
        return at + 1
