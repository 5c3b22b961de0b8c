"""Stop strings: the cut does not depend on how the text was sliced."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deploy.stop_strings import StopMatcher

texts = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def brute_force(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Read character by character; the first end of a stop string decides, the longest wins."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(bounds)]


@given(texts, stop_lists, st.booleans(), st.lists(st.integers(0, 30)))
def test_any_slicing_gives_the_brute_force_result(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, include=include)
    out = ""
    for piece in in_pieces(text, cuts):
        out += matcher.push(piece)
        expected, _ = brute_force(text, stops, include)
        assert expected.startswith(out)
    out += matcher.flush()
    assert (out, matcher.matched) == brute_force(text, stops, include)


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("hello ") == "hello "
    assert matcher.push("EN") == ""
    assert matcher.push("tropy") == "ENtropy"
    assert matcher.push("E") == ""
    assert matcher.flush() == "E"
