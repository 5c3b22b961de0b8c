"""Tool calls in text that arrives in pieces; how it is cut cannot change the result."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from deploy.json_outline import JsonOutline
from deploy.tool_arguments import MAX_HEAD, ObjectScanner, read_fields, read_head
from deploy.tool_formats import (
    UNDECIDED,
    WHITE_SPACE,
    Frame,
    ToolFormat,
    _Undecided,
    match,
    skip_spaces,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """A part of call number `index`: id and name come once, with the first."""

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


def new_call_id() -> str:
    """As OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


class ToolCallParser:
    """Divides an answer into content and calls.

    A call is announced once its name is known and its arguments begin; they are the model's own
    text up to the bracket that closes them, valid or not, or to the end of an answer that was cut.
    What never becomes a call is content, markers and all; white space that touches a call is not.
    Where calls are plain JSON, what stands in other JSON is a part of that and no call.
    With `one_call` everything behind the first call is left out, and `done` says when.
    """

    def __init__(
        self,
        form: ToolFormat,
        *,
        one_call: bool = False,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._form = form
        self._one_call = one_call
        self._make_id = make_id
        self._state = self._in_text
        self._text = ""
        """What is not decided yet; inside a frame all of it since the last call in it."""
        self._at = 0
        """Up to here it has been read."""
        self._frame: Frame | None = None
        self._calls_in_frame = 0
        self._scanner = ObjectScanner()
        self._outline = JsonOutline()
        self._space = ""
        """White space that belongs to the content if more of it follows."""
        self._behind_call = False
        self._content: list[str] = []
        self._deltas: list[CallDelta] = []
        self.num_calls = 0
        self.done = False
        self.is_cut = False
        """Whether the answer ended inside the arguments of its last call."""

    def push(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        """Content and parts of calls that are now certain."""
        self._text += text
        while not self.done and self._state():
            continue
        return self._take()

    def flush(self) -> tuple[str, tuple[CallDelta, ...]]:
        """The rest, once no more text can come."""
        text, self._text = self._text, ""
        if self.done:
            text = ""
        elif self._state == self._in_arguments:
            self._add_arguments(text)
            self.is_cut = True
            text = ""
        elif self._calls_in_frame and self._frame is not None:
            text = text.lstrip(WHITE_SPACE + ",")
            if match(text, 0, self._frame.closing) is UNDECIDED:
                text = ""
        self._say(text)
        if not self._behind_call:
            self._content.append(self._space)
        self._space = ""
        return self._take()

    def _take(self) -> tuple[str, tuple[CallDelta, ...]]:
        content, calls = "".join(self._content), tuple(self._deltas)
        self._content.clear()
        self._deltas.clear()
        return content, calls

    # The states: each goes on with `self._text` and says whether the next one has work to do.

    def _in_text(self) -> bool:
        """Outside of all frames."""
        text = self._text
        for found in self._form.first_chars.finditer(text):
            at = found.start()
            for frame in self._form.frames:
                end = match(text, at, frame.opening)
                if end is None:
                    continue
                self._say(text[:at])
                self._text = text[at:]
                if isinstance(end, _Undecided):
                    return False
                self._frame, self._calls_in_frame = frame, 0
                self._state, self._at = self._before_call, end - at
                return True
            if self._form.is_json and text[at] in "{[":
                self._say(text[:at])
                return self._enter_json(text[at:])
        self._say(text)
        self._text = ""
        return False

    def _enter_json(self, text: str) -> bool:
        self._text, self._outline, self._state = text, JsonOutline(), self._in_json
        return True

    def _in_json(self) -> bool:
        """Inside an object or a list that is no frame."""
        end = self._outline.feed(self._text)
        self._say(self._text[:end])
        self._text = self._text[end:]
        return self._outline.done and self._leave(self._text)

    def _before_call(self) -> bool:
        """Inside a frame: the next call begins, or the frame ends."""
        assert self._frame is not None
        text, at = self._text, skip_spaces(self._text, self._at)
        if self._calls_in_frame:
            end = match(text, at, self._frame.closing)
            if isinstance(end, _Undecided):
                return False
            if end is not None:
                return self._leave(text[end:])
            if text[at] == ",":
                at = skip_spaces(text, at + 1)
        if at == len(text):
            return False
        head = read_head(text, at) if text[at] == "{" else None
        if head is None:
            return self._fail()
        if isinstance(head, _Undecided):
            return False
        self._announce(head.name)
        self._text, self._at = text[head.end :], 0
        if head.arguments is None:
            self._scanner = ObjectScanner(self._form.end_tag)
            self._state = self._in_arguments
        else:
            self._add_arguments(head.arguments)
            self.done = self._one_call
        return True

    def _in_arguments(self) -> bool:
        arguments, read, ended = self._scanner.feed(self._text)
        self._add_arguments(arguments)
        self._text = self._text[read:]
        if ended:
            self.done = self._one_call
            self._state = self._behind_arguments
        return ended

    def _behind_arguments(self) -> bool:
        """Up to the `}` of the call; some models forget it."""
        assert self._frame is not None
        text, at = self._text, skip_spaces(self._text, 0)
        if at == len(text):
            return False
        end: int | _Undecided | None = None
        if text[at] in ",}":
            end = at + 1
            if text[at] == ",":
                end = read_fields(text, skip_spaces(text, end), {})
                # It is read again with every piece: what is too long for a tail is none.
                if (len(text) if isinstance(end, _Undecided) else end or 0) > MAX_HEAD:
                    end = None
        elif (closing := match(text, at, self._frame.closing)) is not None:
            end = closing if isinstance(closing, _Undecided) else at
        if isinstance(end, _Undecided):
            return False
        if end is None:
            return self._leave(text)
        self._text, self._at = text[end:], 0
        self._state = self._before_call
        return True

    def _fail(self) -> bool:
        """What looked like a frame is none: its text is content, and may hold another one."""
        if self._calls_in_frame:
            return self._leave(self._text)
        if self._form.is_json and self._text[0] == "{":
            return self._enter_json(self._text)
        self._say(self._text[0])
        return self._leave(self._text[1:])

    def _leave(self, text: str) -> bool:
        self._text, self._frame, self._state = text, None, self._in_text
        return True

    def _announce(self, name: str) -> None:
        self._behind_call = True
        delta = CallDelta(index=self.num_calls, call_id=self._make_id(), name=name)
        self._deltas.append(delta)
        self.num_calls += 1
        self._calls_in_frame += 1

    def _add_arguments(self, text: str) -> None:
        index = self.num_calls - 1
        if self._deltas and self._deltas[-1].index == index:
            last = self._deltas[-1]
            self._deltas[-1] = replace(last, arguments=last.arguments + text)
        elif text:
            self._deltas.append(CallDelta(index=index, arguments=text))

    def _say(self, text: str) -> None:
        text = self._space + text
        if self._behind_call:
            text = text.lstrip(WHITE_SPACE)
            self._behind_call = not text
        kept = text.rstrip(WHITE_SPACE)
        self._space = text[len(kept) :]
        self._content.append(kept)
