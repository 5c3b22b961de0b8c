"""Tool calls in text: what is read, in each format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy import tool_calls
from deploy.tool_arguments import MAX_HEAD, read_fields
from deploy.tool_calls import CallDelta, ToolCallParser, new_call_id
from deploy.tool_formats import FORMATS, HERMES, JAMBA, JSON, ToolFormat, choose_format
from tests.deploy.tool_texts import Read, read, write

WEATHER = '{"city": "Dallas", "n": 1.50, "deep": [{"a": {}}, "}]{"]}'
ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())


@ALL
def test_calls_keep_the_models_own_text(form: ToolFormat) -> None:
    arguments = [WEATHER, "{}", r'{"q": "\u00e9 \"x\" \\", "u": "日本"}']
    calls = [(f"f-{i}_x", text) for i, text in enumerate(arguments)]
    result = read(form, [write(form, calls)])
    assert list(zip(result.names, result.arguments, strict=True)) == calls
    assert result.content == ""
    assert result.ids == ["call_0", "call_1", "call_2"]


@ALL
def test_text_before_and_behind_is_content(form: ToolFormat) -> None:
    call = write(form, [("f", '{"a": 1}')])
    result = read(form, [f" Let me see.\n{call}\n\n Done.\n"])
    assert result.content == " Let me see.Done.\n"
    assert result.arguments == ['{"a": 1}']
    assert read(form, [f" \n{call}\n"]).content == ""


@ALL
def test_a_tag_inside_a_string_ends_nothing(form: ToolFormat) -> None:
    arguments = json.dumps({"text": "</tool_call> </tool_calls> ]} ``` <tool_call>"})
    result = read(form, [write(form, [("f", arguments), ("g", "{}")])])
    assert result.arguments == [arguments, "{}"]
    assert result.content == ""


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
        (
            HERMES,
            '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
            [("f", '{"a": 1}')],
        ),
        (
            HERMES,
            r'<tool_call>{"name": "f", "arguments": "{\"a\": \"b\"}"}</tool_call>',
            [("f", '{"a": "b"}')],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', [("f", '{"a": 1')]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {}, "id": {"x": [1]}}</tool_call>',
            [("f", "{}")],
        ),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}',
            [("f", "{}"), ("g", "{}")],
        ),
        (
            HERMES,
            '<tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>',
            [("g", "{}")],
        ),
        (
            JAMBA,
            '<tool_calls>[{"name": "f", "arguments": {"a": 1}]</tool_calls>',
            [("f", '{"a": 1}')],
        ),
        (
            JAMBA,
            '<tool_calls>[{"name": "f", "arguments": {}} {"name": "g", "arguments": {}}]',
            [("f", "{}"), ("g", "{}")],
        ),
        (JSON, '```json\n{"tool_calls": [{"name": "f", "arguments": {}}]}\n```', [("f", "{}")]),
        (JSON, '```\n{ "tool_calls" :[{"name": "f", "arguments": {}}] }\n```', [("f", "{}")]),
    ],
)
def test_what_models_write_beside_the_form(
    form: ToolFormat, text: str, calls: list[tuple[str, str]]
) -> None:
    result = read(form, [text])
    assert list(zip(result.names, result.arguments, strict=True)) == calls
    assert result.content in ("", "<tool_call>")


def test_line_breaks_in_strings_are_escaped() -> None:
    result = read(HERMES, ['<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}</tool_call>'])
    assert json.loads(result.arguments[0]) == {"a": "x\ny\t"}


def test_arguments_that_are_not_json_are_the_callers_to_judge() -> None:
    text = "{'city': 'Dallas', n: True,}"
    result = read(JAMBA, [f'<tool_calls>[{{"name": "f", "arguments": {text}}}]</tool_calls>'])
    assert result.arguments == [text]
    assert result.content == ""


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (JAMBA, "<tool_calls>no list</tool_calls>"),
        (JAMBA, "<tool_calls>[]</tool_calls>"),
        (JAMBA, '<tool_calls>[{"arguments": {}}]</tool_calls>'),
        (JAMBA, '<tool_calls>[{"name": "", "arguments": {}}]</tool_calls>'),
        (JAMBA, '<tool_calls>[{"name": 3, "arguments": {}}]</tool_calls>'),
        (JAMBA, '<tool_calls>[{"name": "f", "arguments": [1]}]</tool_calls>'),
        (JAMBA, '<tool_calls>[{"name": "f", "arguments": "no"}]</tool_calls>'),
        (JAMBA, "<tool_calls>[{name: 1}]</tool_calls>"),
        (JAMBA, r'<tool_calls>[{"na\xme": "f"}]</tool_calls>'),
        (JAMBA, "a < b, <tool_cal> and <tool"),
        (HERMES, '<tool_call>\n{"name": "f", "argu'),
        (HERMES, "<tool_call>\n"),
        (HERMES, '<tool_call>{"name" "f"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f"; "arguments": {}}</tool_call>'),
        (JSON, '{"tool_calls": ["f"]} and {"tool": 1}'),
        (JSON, "```python\nprint({})\n```"),
        (JSON, '```json\n{"a": 1}\n``` `{'),
    ],
)
def test_what_is_no_call_stays_text(form: ToolFormat, text: str) -> None:
    result = read(form, [text])
    assert result.content == text
    assert result.names == []


@ALL
def test_a_call_that_is_cut_keeps_what_there_is(form: ToolFormat) -> None:
    whole = write(form, [("f", WEATHER), ("g", "{}")])
    begins = whole.index(WEATHER)
    for end in range(len(whole) + 1):
        result = read(form, [whole[:end]])
        if end <= begins:
            assert (result.content, result.names) == (whole[:end], [])
        else:
            assert result.names[0] == "f"
            assert result.arguments[0] == whole[begins:end][: len(WEATHER)]
            # At most the beginning of the next call: nothing that belongs to a form is content.
            assert result.content[:1] in ("", "{", "<")


@ALL
def test_one_call_ends_the_answer(form: ToolFormat) -> None:
    text = "Well." + write(form, [("f", WEATHER), ("g", "{}")]) + " more"
    parser = ToolCallParser(form, one_call=True)
    said = Read()
    pushed = 0
    for char in text:
        pushed += 1
        said.add(*parser.push(char))
        if parser.done:
            break
    assert text[:pushed].endswith(WEATHER)
    assert (said.names, said.arguments, said.content) == (["f"], [WEATHER], "Well.")
    whole = read(form, [text], one_call=True)
    assert (whole.names, whole.arguments, whole.content) == (["f"], [WEATHER], "Well.")


def test_a_call_is_streamed_as_it_comes() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == ("", ())
    _, (first,) = parser.push('{"a')
    assert (first.name, first.arguments) == ("f", '{"a')
    _, (second,) = parser.push('": 1')
    assert second == CallDelta(index=0, arguments='": 1')
    assert parser.push("}}\n</tool_call>") == ("", (CallDelta(index=0, arguments="}"),))
    assert parser.flush() == ("", ())


def test_nothing_is_held_back_without_need() -> None:
    parser = ToolCallParser(JAMBA)
    assert parser.push("a < b") == ("a < b", ())
    assert parser.push(" <tool_calls") == ("", ())
    assert parser.push("!") == (" <tool_calls!", ())


def test_a_head_without_end_is_text() -> None:
    text = '<tool_call>{"x": "' + "y" * 20_000 + '", "name": "f", "arguments": {}}</tool_call>'
    assert read(HERMES, [text]).content == text
    assert read(HERMES, list(text)).content == text


@pytest.mark.parametrize("form", [HERMES, JAMBA])
def test_a_tail_of_a_call_is_bounded(form: ToolFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, closing = ("<tool_calls>[", "]</tool_calls>") if form is JAMBA else form.markers
    head = f'{opening}{{"name": "f", "arguments": {{"a": 1}}'
    short, long = (f', "x": "{"y" * length}"}}' for length in (MAX_HEAD - 20, 20 * MAX_HEAD))
    reads: list[int] = []

    def counted(text: str, *args: Any) -> Any:
        reads.append(len(text))
        return read_fields(text, *args)

    monkeypatch.setattr(tool_calls, "read_fields", counted)
    for tail, content in ((short, ""), (long, long + closing)):
        for pieces in ([head + tail + closing], list(head + tail + closing)):
            reads.clear()
            result = read(form, pieces)
            assert (result.names, result.arguments) == (["f"], ['{"a": 1}'])
            assert result.content == content
            # What comes a character at a time is read again with each, but never all of it.
            assert len(pieces) == 1 or len(reads) <= MAX_HEAD + 2


CALL = '{"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}'


@pytest.mark.parametrize(
    "around",
    [
        '{"example": CALL}',
        "[CALL]",
        '[1, -2.5e3, null, "x\\"", CALL, {}]',
        '{"a": {"b": [[], {"c": true}, CALL]}}',
        '{"tool_calls": [{"name": 1}], "more": CALL}',
        '{"tool_calls": [CALL]}',
        '```json\n{"example": CALL}\n```',
        '{"text": "```json\nCALL\n```"}',
        '{"text": "see ```json CALL```"}',
        'As in {"example": CALL}, or [CALL].',
    ],
)
def test_a_call_inside_of_other_json_is_none(around: str) -> None:
    text = around.replace("CALL", CALL)
    for pieces in ([text], list(text)):
        result = read(JSON, pieces)
        assert (result.content, result.names) == (text, [])
    behind = read(JSON, list(f"{text}\nNow: {CALL}"))
    assert (behind.content, behind.names) == (f"{text}\nNow:", ["f"])


@pytest.mark.parametrize(
    "before",
    [
        "Sure:",
        "A set {a, b} and",
        "[docs](https://x.y)",
        '{"a": 1}',
        '{"a" 1}',
        "{",
        "[1 2",
        'He said {"a", "b"},',
        "for (i = 0; i < 3; i++) { f[i] = {} }",
        '{"a": [}',
    ],
)
def test_what_is_no_json_hides_no_call(before: str) -> None:
    for pieces in ([f"{before} {CALL}"], list(f"{before} {CALL}")):
        result = read(JSON, pieces)
        assert (result.content, result.names) == (before, ["f"])


@ALL
def test_it_is_said_whether_the_last_call_is_cut(form: ToolFormat) -> None:
    whole = write(form, [("f", WEATHER)])
    begins = whole.index(WEATHER)
    for end in range(len(whole) + 1):
        parser = ToolCallParser(form)
        parser.push(whole[:end])
        parser.flush()
        assert parser.is_cut == (begins < end < begins + len(WEATHER))


def test_ids_look_like_openais() -> None:
    assert new_call_id().startswith("call_")
    assert new_call_id() != new_call_id()


@pytest.mark.parametrize(
    ("asked", "template", "variables", "chosen"),
    [
        ("auto", "{{ tools }}<tool_calls>", {"tools"}, "jamba"),
        ("auto", "{{ tools }}<tool_call>", {"tools"}, "hermes"),
        ("auto", "{{ tools }}[TOOL_CALLS]", {"tools"}, "none"),
        ("auto", "{{ messages }}", {"messages"}, "json"),
        ("auto", None, set(), "none"),
        ("json", "{{ tools }}<tool_call>", {"tools"}, "json"),
        ("hermes", "{{ tools }}", {"tools"}, "hermes"),
        ("none", "{{ tools }}<tool_call>", {"tools"}, "none"),
    ],
)
def test_the_format_follows_the_template(
    asked: str, template: str | None, variables: set[str], chosen: str
) -> None:
    assert choose_format(asked, template, variables) == chosen


def test_a_template_without_tools_takes_no_foreign_format() -> None:
    with pytest.raises(ValueError, match="tool_call_parser=jamba"):
        choose_format("jamba", "{{ messages }}", {"messages"})
