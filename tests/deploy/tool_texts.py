"""Tool calls as models write them, and what a client puts together from the parser's parts."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field

from deploy.tool_calls import CallDelta, ToolCallParser
from deploy.tool_formats import HERMES, JAMBA, ToolFormat


@dataclass
class Read:
    """What a client puts together from the parts."""

    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, content: str, calls: tuple[CallDelta, ...]) -> None:
        self.content += content
        for call in calls:
            if call.name is not None:
                assert call.index == len(self.names)
                assert call.call_id is not None
                self.names.append(call.name)
                self.ids.append(call.call_id)
                self.arguments.append("")
            else:
                assert call.call_id is None
            assert call.index == len(self.names) - 1
            self.arguments[call.index] += call.arguments


def read(form: ToolFormat, pieces: list[str], *, one_call: bool = False) -> Read:
    counter = itertools.count()
    parser = ToolCallParser(form, one_call=one_call, make_id=lambda: f"call_{next(counter)}")
    result = Read()
    for piece in pieces:
        result.add(*parser.push(piece))
    result.add(*parser.flush())
    assert parser.num_calls == len(result.names)
    return result


def write(form: ToolFormat, calls: list[tuple[str, str]]) -> str:
    """As the models write them."""
    texts = [f'{{"name": {json.dumps(name)}, "arguments": {args}}}' for name, args in calls]
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    if form is JAMBA:
        return "<tool_calls>[\n    " + ",\n    ".join(texts) + "\n]</tool_calls>"
    return '{"tool_calls": [' + ", ".join(texts) + "]}"
