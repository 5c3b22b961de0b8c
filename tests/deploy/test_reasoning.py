"""Reasoning is divided from the answer, wherever the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.reasoning import ReasoningSplitter, choose_reasoning, ends_in_reasoning


def split(pieces: list[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("<think>\nfirst\nthen\n</think>\n\nSo.\n", False, "first\nthen", "So.\n"),
        ("first\n</think>\n\nSo.", True, "first", "So."),
        (" \n<think>a</think>b", False, "a", "b"),
        ("plain <think>a</think>", False, "", "plain <think>a</think>"),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("a < b </thin", True, "a < b </thin", ""),
        ("<thin", False, "", "<thin"),
        ("  x", False, "", "  x"),
        ("</think>x", True, "", "x"),
        ("no end", True, "no end", ""),
    ],
)
def test_reasoning_and_answer(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split([text], opened) == (reasoning, answer)
    assert split(list(text), opened) == (reasoning, answer)


SCRAPS = st.sampled_from(["<think>", "</think>", "<", "</thi", " ", "\n", "a", "é", ">"])


@given(
    st.lists(SCRAPS, max_size=8).map("".join),
    st.booleans(),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_no_cut_changes_the_result(text: str, opened: bool, cuts: list[int]) -> None:
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    whole = split([text], opened)
    assert split([text[a:b] for a, b in pairwise(bounds)], opened) == whole
    assert split(list(text), opened) == whole


def test_reasoning_is_streamed_as_it_comes() -> None:
    splitter = ReasoningSplitter(opened=True)
    assert splitter.push("\nOne ") == ("One", "")
    assert splitter.push("two</") == (" two", "")
    assert splitter.thinking
    assert splitter.push("think>\n") == ("", "")
    assert not splitter.thinking
    assert splitter.push("\nYes") == ("", "Yes")


def test_the_prompts_end_says_who_opened_it() -> None:
    assert ends_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not ends_in_reasoning("think within <think> </think> tags<|im_start|>assistant\n")
    assert ends_in_reasoning("...<think>One", "<think>One")
    assert not ends_in_reasoning("...<think>One</think>", "<think>One</think>")


@pytest.mark.parametrize(
    ("asked", "template", "chosen"),
    [
        ("auto", "{{ '<think>' }}", "think"),
        ("auto", "{{ messages }}", "none"),
        ("auto", None, "none"),
        ("none", "{{ '<think>' }}", "none"),
        ("think", "{{ messages }}", "think"),
    ],
)
def test_the_parser_follows_the_template(asked: str, template: str | None, chosen: str) -> None:
    assert choose_reasoning(asked, template) == chosen
