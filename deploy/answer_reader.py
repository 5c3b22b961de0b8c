"""The parts of a chat answer: reasoning, content and tool calls, as its text comes in."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.reasoning import ReasoningSplitter
from deploy.tool_calls import CallDelta, ToolCallParser
from deploy.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answers to one request are read."""

    tool_format: ToolFormat | None = None
    one_call: bool = False
    """The answer ends with its first call."""
    reasoning: bool = False
    """It may begin with reasoning."""
    reasoning_opened: bool = False
    """The prompt has begun it."""
    show_reasoning: bool = True
    visible_ids: frozenset[int] = frozenset()
    """Special tokens that are read as text."""


PLAIN = Reading()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a piece of text brought; all of it is certain."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class AnswerReader:
    """Reads one answer; how its text is cut cannot change the parts' sums."""

    def __init__(self, reading: Reading) -> None:
        self._show_reasoning = reading.show_reasoning
        self._splitter = (
            ReasoningSplitter(opened=reading.reasoning_opened) if reading.reasoning else None
        )
        form = reading.tool_format
        self._parser = None if form is None else ToolCallParser(form, one_call=reading.one_call)

    @property
    def thinking(self) -> bool:
        """Whether the next text is reasoning, unless it ends it."""
        return self._splitter is not None and self._splitter.thinking

    @property
    def has_called(self) -> bool:
        """Whether the model has called tools, and the answer ended behind the last call."""
        parser = self._parser
        return parser is not None and parser.num_calls > 0 and not parser.is_cut

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return self._parser is not None and self._parser.done

    def push(self, text: str, *, last: bool = False) -> Parts:
        """The parts that are certain now; all of the rest with the `last` text."""
        reasoning, answer = self._split(text, last)
        calls: tuple[CallDelta, ...] = ()
        if self._parser is not None:
            answer, calls = self._parser.push(answer)
            if last:
                content, more = self._parser.flush()
                answer, calls = answer + content, calls + more
        shown = reasoning if self._show_reasoning else ""
        return Parts(content=answer, reasoning=shown, calls=calls)

    def _split(self, text: str, last: bool) -> tuple[str, str]:
        if self._splitter is None:
            return "", text
        reasoning, answer = self._splitter.push(text)
        if last:
            more = self._splitter.flush()
            reasoning, answer = reasoning + more[0], answer + more[1]
        return reasoning, answer
