"""The JSON around a tool call's arguments, read from text that may end anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from deploy.tool_formats import UNDECIDED, _Undecided, skip_spaces

MAX_HEAD = 2048
"""Characters of a call before its name and the beginning of its arguments are known."""
_PLAIN = re.compile(r'["{}\[\]<]')
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_ATOM = re.compile(r"[-+.\w]+")
_CLOSERS = {"{": "}", "[": "]"}


class ObjectScanner:
    """Finds the end of an object or a list that arrives in pieces, as its brackets balance.

    What is inside is not judged. It also ends at a bracket that does not fit, or at `end_tag`
    outside of strings. Raw control characters in strings, which JSON forbids, are escaped.
    """

    def __init__(self, end_tag: str | None = None) -> None:
        self._end_tag = end_tag
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False
        self.balanced = False
        """Whether it ended with its own last bracket."""

    def feed(self, text: str) -> tuple[str, int, bool]:
        """The object's text in `text`, how many characters were read, and whether it ended."""
        out: list[str] = []
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                out.append(text[at])
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _PLAIN).search(text, at)
            stop = len(text) if found is None else found.start()
            out.append(text[at:stop])
            at = stop
            if at == len(text):
                break
            char = text[at]
            if char == "<" and not self._in_string:
                ended = self._tag_at(text, at)
                if ended is not None:
                    return "".join(out), at, ended
            elif not self._take(char):
                return "".join(out), at, True
            out.append(json.dumps(char)[1:-1] if char < " " else char)
            at += 1
            if self.balanced:
                return "".join(out), at, True
        return "".join(out), at, False

    def _tag_at(self, text: str, at: int) -> bool | None:
        """Whether the end tag is whole; None where it does not stand."""
        tag = self._end_tag
        rest = text[at : at + len(tag)] if tag is not None else ""
        return rest == tag if tag is not None and tag.startswith(rest) else None

    def _take(self, char: str) -> bool:
        """Follow one special character; False for a bracket that does not fit."""
        if self._in_string:
            self._in_string = char != '"'
            self._escaped = char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif self._closers[-1] == char:
            self._closers.pop()
            self.balanced = not self._closers
        else:
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A call as far as it has to be known: whole, or up to the `{` of its arguments at `end`."""

    name: str
    arguments: str | None
    """None where they begin at `end`."""
    end: int


def read_head(text: str, at: int) -> Head | _Undecided | None:
    """The call whose `{` stands at `at`; None for what is no call."""
    fields: dict[str, str] = {}
    end = read_fields(text, skip_spaces(text, at + 1), fields, up_to_arguments=True)
    if end is None or isinstance(end, _Undecided):
        # Measured the same way however the text was cut.
        return None if end is None or len(text) - at > MAX_HEAD else UNDECIDED
    name = _name(fields.get("name"))
    if name is None or end - at > MAX_HEAD:
        return None
    if text[end - 1] != "}":
        return Head(name=name, arguments=None, end=end)
    arguments = _whole_arguments(fields.get("arguments", "null"))
    return None if arguments is None else Head(name=name, arguments=arguments, end=end)


def read_fields(
    text: str, at: int, fields: dict[str, str], *, up_to_arguments: bool = False
) -> int | _Undecided | None:
    """Read `"key": value` pairs into `fields`: behind their `}`, or at the arguments' `{`.

    The latter only `up_to_arguments` of a call whose name is known.
    """
    while at < len(text) and text[at] != "}":
        key_end = _value_end(text, at) if text[at] == '"' else None
        if not isinstance(key_end, int):
            return key_end
        key = _string(text[at:key_end])
        at = skip_spaces(text, key_end)
        if at < len(text) and text[at] != ":":
            return None
        at = skip_spaces(text, at + 1)
        if at >= len(text):
            return UNDECIDED
        if up_to_arguments and key == "arguments" and "name" in fields and text[at] == "{":
            return at
        end = _value_end(text, at)
        if key is None or not isinstance(end, int):
            return end if key is not None else None
        fields[key] = text[at:end]
        at = skip_spaces(text, end)
        if at < len(text) and text[at] == ",":
            at = skip_spaces(text, at + 1)
        elif at < len(text) and text[at] != "}":
            return None
    return UNDECIDED if at >= len(text) else at + 1


def _value_end(text: str, at: int) -> int | _Undecided | None:
    char = text[at]
    if char == '"':
        string = _STRING.match(text, at)
        return UNDECIDED if string is None else string.end()
    if char in _CLOSERS:
        scanner = ObjectScanner()
        _, read, ended = scanner.feed(text[at:])
        if not ended:
            return UNDECIDED
        return at + read if scanner.balanced else None
    atom = _ATOM.match(text, at)
    if atom is None:
        return None
    return UNDECIDED if atom.end() == len(text) else atom.end()


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _name(text: str | None) -> str | None:
    return None if text is None else (_string(text) or None)


def _whole_arguments(text: str) -> str | None:
    """Of a call that came as a whole: none at all stand for `{}`, a string for what it spells."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        text = (_string(text) or "").strip()
    if not text.startswith("{"):
        return None
    scanner = ObjectScanner()
    arguments, read, _ = scanner.feed(text)
    return arguments if scanner.balanced and read == len(text) else None
