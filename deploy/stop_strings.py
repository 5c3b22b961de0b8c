"""Stop strings over text that arrives in pieces; how it is cut cannot change the result."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the stop string that ends first (the longest of those that do).

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing comes through after it."""

    def push(self, text: str) -> str:
        """Text that is now certain not to belong to a stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        self._held = ""
        found = self._first_match(text)
        if found is not None:
            start, self.matched = found
            return text[: start + len(self.matched)] if self._include else text[:start]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max((len(s) for s in self._stops), default=0) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops if len(s) > length):
                return length
        return 0
