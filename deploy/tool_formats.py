"""How models write tool calls: each format's markers, and the rule that chooses one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

WHITE_SPACE = " \t\r\n"
_SPACES = re.compile(f"[{WHITE_SPACE}]*")


class _Undecided:
    """The text ends before it can be told."""


UNDECIDED = _Undecided()


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Literals before and behind calls; white space between them is free."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """A way to write calls, each an object with `name` and `arguments`."""

    name: str
    frames: tuple[Frame, ...]
    markers: tuple[str, ...] = ()
    """Texts that many checkpoints have as special tokens; the last one closes."""

    @property
    def is_json(self) -> bool:
        """Whether calls are JSON like any other, but for the name of a key."""
        return not self.markers

    @property
    def end_tag(self) -> str | None:
        """What ends calls, however incomplete, unless it stands in a string."""
        return self.markers[-1] if self.markers else None

    @cached_property
    def first_chars(self) -> re.Pattern[str]:
        """Finds where a frame, or JSON that is none, may open."""
        chars = {frame.opening[0][0] for frame in self.frames} | ({"["} if self.is_json else set())
        return re.compile("[" + re.escape("".join(sorted(chars))) + "]")


JAMBA = ToolFormat(
    name="jamba",
    frames=(Frame(opening=("<tool_calls>", "["), closing=("]", "</tool_calls>")),),
    markers=("<tool_calls>", "</tool_calls>"),
)
HERMES = ToolFormat(
    name="hermes",
    frames=(Frame(opening=("<tool_call>",), closing=("</tool_call>",)),),
    markers=("<tool_call>", "</tool_call>"),
)
_OBJECT = ("{", '"tool_calls"', ":", "[")
# Ours, see tool_prompt.py. Models like to put JSON into a code block.
JSON = ToolFormat(
    name="json",
    frames=(
        Frame(opening=_OBJECT, closing=("]", "}")),
        Frame(opening=("```", *_OBJECT), closing=("]", "}", "```")),
        Frame(opening=("```json", *_OBJECT), closing=("]", "}", "```")),
    ),
)
FORMATS = {form.name: form for form in (JAMBA, HERMES, JSON)}


def choose_format(asked: str, template: str | None, variables: Collection[str]) -> str:
    """The name of a format, or `none`. Raises ValueError where `asked` cannot work.

    By the chat template's text and the variables that it reads: the markers that it names; without
    any `json` where it knows no tools, and `none` where it has a format of its own.
    """
    if asked in (JAMBA.name, HERMES.name) and "tools" not in variables:
        raise ValueError(
            f"tool_call_parser={asked}: the chat template has no place for tools; "
            "allowed values are auto, json, none"
        )
    if asked != "auto" or template is None:
        return "none" if asked == "auto" else asked
    if "tools" not in variables:
        return JSON.name
    for form in (JAMBA, HERMES):
        if form.markers[0] in template:
            return form.name
    return "none"


def skip_spaces(text: str, at: int) -> int:
    """Where white space from `at` on ends."""
    found = _SPACES.match(text, at)
    assert found is not None
    return found.end()


def match(text: str, at: int, literals: tuple[str, ...]) -> int | _Undecided | None:
    """Where `literals`, with white space between them, end; None where they do not stand."""
    for i, literal in enumerate(literals):
        if i:
            at = skip_spaces(text, at)
        if text.startswith(literal, at):
            at += len(literal)
        elif literal.startswith(text[at : at + len(literal)]):
            return UNDECIDED
        else:
            return None
    return at
