"""No cut of an answer's text changes what is read of it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from deploy.tool_formats import FORMATS, HERMES, ToolFormat
from tests.deploy.tool_texts import read, write

# Fuzz: pieces of real calls, of broken ones and of text, in any order and cut anywhere.
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)
objects = st.dictionaries(st.text(max_size=4), json_values, max_size=3)
SCRAPS = (
    *("<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>", '{"tool_calls": [', "]}"),
    *(
        '{"name": "f", "arguments": {',
        '"a": 1}}',
        '"arguments": ',
        '"name": "g"',
        "null",
        "```json",
    ),
    *("```", "[", "]", "{", "}", ",", ":", '"', "\\", "<", "<tool", " ", "\n", "text", "é", "\x01"),
)
forms = st.sampled_from(list(FORMATS.values()))


@st.composite
def answers(draw: st.DrawFn) -> tuple[ToolFormat, str]:
    form = draw(forms)
    calls = st.lists(
        st.tuples(st.sampled_from(["f", "get_x"]), objects.map(json.dumps)), min_size=1, max_size=2
    )
    parts = st.one_of(st.sampled_from(SCRAPS), calls.map(lambda c: write(form, c)))
    return form, "".join(draw(st.lists(parts, max_size=8)))


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(bounds)]


@given(answers(), st.lists(st.integers(0, 400), max_size=6), st.booleans())
@example((HERMES, '<tool_call>{"name": "f", "arguments": {"a": <b}}</tool_call>'), [46], False)
@example((HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_'), [50], False)
def test_no_cut_changes_the_result(
    answer: tuple[ToolFormat, str], cuts: list[int], one_call: bool
) -> None:
    form, text = answer
    whole = read(form, [text], one_call=one_call)
    assert read(form, in_pieces(text, cuts), one_call=one_call) == whole
    assert read(form, list(text), one_call=one_call) == whole


@given(
    forms,
    st.text(alphabet="ab <>\n", max_size=12),
    st.lists(st.tuples(st.sampled_from(["f", "get_x"]), objects), min_size=1, max_size=3),
    st.lists(st.integers(0, 400), max_size=6),
)
def test_calls_are_found_wherever_they_stand(
    form: ToolFormat, before: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    result = read(form, in_pieces(before + write(form, written), cuts))
    assert result.content == before.rstrip(" \n")
    assert list(zip(result.names, result.arguments, strict=True)) == written


@given(st.lists(st.sampled_from(SCRAPS), max_size=12).map("".join), forms)
def test_text_without_a_call_is_never_lost(text: str, form: ToolFormat) -> None:
    result = read(form, [text])
    if not result.names:
        assert result.content == text
