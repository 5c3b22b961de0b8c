"""Masks against brute force over small languages, and states that are rebuilt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.structured_outputs import choice_grammar, lark_grammar, regex_grammar, schema_grammar
from router.codec import decode, encode
from router.step import NO_TOKEN, Sampled, SamplingParams
from shards.grammar import Constraint, Grammars
from shards.logits_processors import TokenHistory
from shards.sampler import SampleRequest, sample
from shards.vocabulary import Vocabulary

BYTES = [bytes([byte]) for byte in range(256)]
MORE = [b"ab", b"aba", b"bb", b"a", "é".encode(), b"\xa9b", b"", b"true", b'":', b"  "]
TOKENS = [*BYTES, *MORE, b"<end>", b"<tool>", b"", b""]
END, TOOL = 266, 267
VOCABULARY = Vocabulary.of(TOKENS, [TOOL], (END,))
GRAMMARS = Grammars(VOCABULARY)
WITHOUT_END = Grammars(Vocabulary.of(TOKENS, [END, TOOL], ()))
SIZE = len(TOKENS)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "true", 7]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "number"}, {"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}

words = st.text("abé", max_size=5)


def token(token_id: int) -> Sampled:
    return Sampled(seq_id=1, token_id=token_id)


def allowed(constraint: Constraint) -> list[int]:
    return np.flatnonzero(constraint.mask(SIZE)).tolist()


def by_brute_force(language: set[bytes], before: bytes, end: int | None) -> list[int]:
    ids = [
        token_id
        for token_id, spelling in enumerate(TOKENS)
        if spelling
        and token_id not in (END, TOOL)
        and any(text.startswith(before + spelling) for text in language)
    ]
    return sorted(ids + [end] * (end is not None and before in language))


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=8), st.data(), st.booleans())
def test_a_token_is_allowed_where_it_leads_to_a_member(
    choices: list[str], data: st.DataObject, has_end: bool
) -> None:
    language = {text.encode() for text in choices}
    grammars, end = (GRAMMARS, END) if has_end else (WITHOUT_END, None)
    constraint, text = grammars.begin(choice_grammar(choices), ()), b""
    while True:
        expected = by_brute_force(language, text, end)
        assert allowed(constraint) == expected
        if not expected:
            # Without a token that ends it: the stage says so itself.
            assert constraint.give_up(1) == Sampled(seq_id=1, token_id=NO_TOKEN, ends=True)
            return
        chosen = data.draw(st.sampled_from(expected))
        text += TOKENS[chosen] if chosen != END else b""
        is_last = chosen == END or not any(t.startswith(text) and t != text for t in language)
        assert constraint.take(token(chosen)).ends == is_last
        if is_last:
            assert text in language
            return


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_regular_language(data: st.DataObject) -> None:
    language = {f"{a}{b}/".encode() for a, b in product(("", "é", "ab"), ("b", "bb", ""))}
    constraint, text = GRAMMARS.begin(regex_grammar("(é|ab)?b{0,2}/"), ()), b""
    while text not in language:
        expected = by_brute_force(language, text, END)
        assert allowed(constraint) == expected
        chosen = data.draw(st.sampled_from(expected))
        constraint.take(token(chosen))
        text += TOKENS[chosen]


def walk(constraint: Constraint, seed: int, most: int = 60) -> Iterator[int]:
    """Random tokens that the grammar allows, until it ends."""
    random = np.random.default_rng(seed)
    for _ in range(most):
        chosen = int(random.choice(allowed(constraint)))
        yield chosen
        if constraint.take(token(chosen)).ends:
            return


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60))
def test_a_state_is_rebuilt_from_what_was_emitted(seed: int, cut: int) -> None:
    grammar = schema_grammar(SCHEMA)
    live = GRAMMARS.begin(grammar, ())
    emitted: list[int] = []
    for chosen in walk(live, seed, cut):
        emitted.append(chosen)
    again = Grammars(VOCABULARY).begin(grammar, emitted)
    np.testing.assert_array_equal(again.mask(SIZE), live.mask(SIZE))


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_walked_is_json(seed: int) -> None:
    values = [1, "é", None]
    schema = {"type": "array", "items": {"enum": values}, "minItems": 1, "maxItems": 3}
    ids = list(walk(GRAMMARS.begin(schema_grammar(schema), ()), seed, 1000))
    found = json.loads(b"".join(TOKENS[i] for i in ids))
    assert 1 <= len(found) <= 3
    assert all(value in values for value in found)


def test_special_tokens_only_by_name() -> None:
    constraint = GRAMMARS.begin(lark_grammar('start: <tool> "<tool>"'), ())
    assert allowed(constraint) == [TOOL]
    constraint.take(token(TOOL))
    assert allowed(constraint) == [ord("<")]


def test_what_cannot_be_followed_says_why() -> None:
    unknown = GRAMMARS.begin(lark_grammar("start: <nothing>"), ())
    assert not allowed(unknown)
    assert 'unknown special token: "<nothing>"' in unknown.give_up(1).error
    astray = GRAMMARS.begin(choice_grammar(["a"]), [ord("b")])
    assert not allowed(astray)
    assert astray.give_up(1).error.startswith("grammar: ")
    nowhere = Grammars(None).begin(choice_grammar(["a"]), ())
    assert not allowed(nowhere)
    assert "no tokenizer" in nowhere.give_up(1).error
    assert "\n" not in unknown.give_up(1).error + astray.give_up(1).error


def test_a_vocabulary_travels() -> None:
    assert VOCABULARY.tokens() == TOKENS
    assert decode(Vocabulary, encode(VOCABULARY)) == VOCABULARY
    assert (VOCABULARY.special_ids, VOCABULARY.eos_ids) == ((END, TOOL), (END,))
    assert len(repr(VOCABULARY)) < 100


def request_of(
    grammar: str | None = None, emitted: Sequence[int] = (), seq_id: int = 0, **sampling: object
) -> SampleRequest:
    params = replace(SamplingParams(max_tokens=9, seed=seq_id), **sampling)
    constraint = None if grammar is None else GRAMMARS.begin(grammar, emitted)
    history = TokenHistory((1, 2), emitted)
    return SampleRequest(seq_id=seq_id, history=history, sampling=params, constraint=constraint)


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn((rows, SIZE), generator=torch.Generator().manual_seed(seed)) * 3


GREEDY = {"temperature": 0.0, "logprobs": None}
YES_NO = choice_grammar(["yes", "no"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_neighbours_feel_nothing(seed: int) -> None:
    logits = random_logits(6, seed)
    plain = [
        request_of(seq_id=0, **GREEDY),
        request_of(seq_id=2, temperature=0.8, logprobs=2),
        request_of(seq_id=4, **GREEDY),
    ]
    bound = [
        request_of(YES_NO, seq_id=1, **GREEDY),
        request_of(YES_NO, seq_id=3, temperature=1.0, logprobs=3),
        request_of(schema_grammar(SCHEMA), [ord("{")], seq_id=5, top_p=0.9),
    ]
    [greedy] = sample(logits[1][None], bound[:1])
    assert greedy.token_id == max((ord("y"), ord("n")), key=lambda i: float(logits[1, i]))
    together = sample(logits, [r for pair in zip(plain, bound, strict=True) for r in pair])
    assert together[::2] == sample(logits[::2].contiguous(), plain)
    assert together[1::2] == sample(logits[1::2].contiguous(), bound)
    assert all(
        [sampled] == sample(logits[r.seq_id][None], [r])
        for r, sampled in zip(bound, together[1::2], strict=True)
    )


def test_the_greatest_allowed_logit_and_raw_log_probabilities() -> None:
    logits = random_logits(1, 3)
    [sampled] = sample(logits, [request_of(YES_NO, temperature=0.0, logprobs=1)])
    best = max((ord("y"), ord("n")), key=lambda i: float(logits[0, i]))
    assert sampled.token_id == best
    raw = torch.log_softmax(logits[0], dim=-1)
    assert sampled.logprob == float(raw[best])
    assert sampled.top_logprobs == ((int(logits[0].argmax()), float(raw.max())),)


@pytest.mark.filterwarnings("error")
def test_other_wishes_beside_a_grammar() -> None:
    logits = random_logits(1, 4)

    def choose(grammar: str, emitted: Sequence[int] = (), **sampling: object) -> Sampled:
        return sample(logits, [request_of(grammar, emitted, **sampling)])[0]

    y, n = ord("y"), ord("n")
    assert choose(YES_NO, allowed_token_ids=(n, 5)).token_id == n
    assert choose(YES_NO, bad_words=((n,),)).token_id == y
    assert choose(YES_NO, logit_bias=((n, 100.0),), temperature=0.0).token_id == n
    # A ban gives way where the grammar leaves nothing else, as min_tokens does.
    assert choose(choice_grammar(["n"]), bad_words=((n,),)).token_id == n
    a, few = ord("a"), {"min_tokens": 5, "stop_token_ids": (END,)}
    assert choose(choice_grammar(["a", "aé"]), [a], **few).token_id in (0xC3, 260)
    assert choose(regex_grammar("a?"), [], min_tokens=0, allowed_token_ids=(END,)).token_id == END
    nothing = choose(YES_NO, allowed_token_ids=(5, 6))
    assert nothing.token_id == NO_TOKEN
    assert "allowed_token_ids" in nothing.error
    assert choose(choice_grammar(["a", "aé"]), [a], allowed_token_ids=(5,)) == Sampled(
        seq_id=0, token_id=NO_TOKEN, ends=True
    )


def test_logits_that_are_not_finite_are_the_models_fault() -> None:
    logits = random_logits(2, 5)
    logits[0, 7] = float("nan")
    first, second = sample(logits, [request_of(YES_NO, seq_id=0), request_of(YES_NO, seq_id=1)])
    assert (first.token_id, first.error, first.ends) == (NO_TOKEN, "", False)
    assert second.token_id in (ord("y"), ord("n"))
