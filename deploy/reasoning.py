"""What a model thinks before it answers, divided from the answer; cuts cannot change the result."""

from __future__ import annotations

from enum import Enum, auto

from deploy.tool_formats import UNDECIDED, WHITE_SPACE, match, skip_spaces

THINK, END_THINK = "<think>", "</think>"
MARKERS = (THINK, END_THINK)


def choose_reasoning(asked: str, template: str | None) -> str:
    """`think` where it was asked for, or where the chat template's text names the marker."""
    if asked != "auto":
        return asked
    return "think" if template is not None and THINK in template else "none"


def ends_in_reasoning(prompt: str, continued: str = "") -> bool:
    """Whether the model goes on with reasoning that a chat template has opened.

    Or the last message did, where it is `continued`.
    """
    opened = continued.rfind(THINK) > continued.rfind(END_THINK)
    return opened or prompt.rstrip(WHITE_SPACE).endswith(THINK)


class _Place(Enum):
    START = auto()
    REASONING = auto()
    BEHIND = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Reads `<think>…</think>` at the beginning of an answer; the prompt may have `opened` it.

    White space that touches a marker belongs to neither part.
    """

    def __init__(self, *, opened: bool) -> None:
        self._place = _Place.REASONING if opened else _Place.START
        self._text = ""
        self._begun = False

    @property
    def thinking(self) -> bool:
        """Whether the next text is reasoning, unless it ends it."""
        return self._place is _Place.REASONING

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that are now certain."""
        self._text += text
        if self._place is _Place.START:
            self._start()
        reasoning = self._reasoning() if self._place is _Place.REASONING else ""
        if self._place is _Place.BEHIND:
            self._text = self._text.lstrip(WHITE_SPACE)
            self._place = _Place.ANSWER if self._text else _Place.BEHIND
        return reasoning, self._rest() if self._place is _Place.ANSWER else ""

    def flush(self) -> tuple[str, str]:
        """The rest, once no more text can come."""
        rest = self._rest()
        return (rest, "") if self.thinking else ("", rest)

    def _start(self) -> None:
        at = skip_spaces(self._text, 0)
        end = match(self._text, at, (THINK,))
        if end is None:
            self._place = _Place.ANSWER
        elif isinstance(end, int):
            self._text = self._text[end:]
            self._place = _Place.REASONING

    def _reasoning(self) -> str:
        text = self._text if self._begun else self._text.lstrip(WHITE_SPACE)
        before, marker, behind = text.partition(END_THINK)
        if marker:
            self._text, self._place = behind, _Place.BEHIND
            return before.rstrip(WHITE_SPACE)
        at = text.rfind("<")
        held = at if at >= 0 and match(text, at, (END_THINK,)) is UNDECIDED else len(text)
        certain = text[:held].rstrip(WHITE_SPACE)
        self._text = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain

    def _rest(self) -> str:
        text, self._text = self._text, ""
        return text
