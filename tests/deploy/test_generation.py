"""From request to sampling parameters, and from tokens to text."""

from __future__ import annotations

from typing import Any

from deploy.generation import ChoiceText, plan_choices
from deploy.openai_schema import ChatRequest, CompletionRequest, parse_request
from router.step import FinishReason, Token
from tests.deploy.conftest import load_nano

MODEL = load_nano("nano-jamba")
EOS = MODEL.defaults.eos_token_ids
USER = [{"role": "user", "content": "Hi"}]


def plans(**fields: Any) -> list[Any]:
    request = parse_request(CompletionRequest, {"prompt": [5], **fields})
    return plan_choices(MODEL, request, [(5,)])


def test_sampling_defaults_are_openais() -> None:
    [plan] = plans()
    sampling = plan.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_tokens == 16
    assert sampling.stop_token_ids == EOS
    assert sampling.logprobs is None


def test_fields_reach_the_sampler() -> None:
    [first, second] = plans(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-1, n=2, stop_token_ids=[9, EOS[0]],
        logprobs=0, priority=-3, min_tokens=2, max_tokens=4,
    )  # fmt: skip
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
    assert sampling.top_k == 0
    assert sampling.seed == second.sampling.seed == 2**63 - 1
    assert (sampling.sample_idx, second.sampling.sample_idx) == (0, 1)
    assert sampling.stop_token_ids == (*EOS, 9)
    assert sampling.logprobs == 0
    assert (sampling.min_tokens, sampling.max_tokens, first.priority) == (2, 4, -3)


def test_ignore_eos_keeps_the_callers_own_stop_tokens() -> None:
    [plan] = plans(ignore_eos=True, stop_token_ids=[9])
    assert plan.sampling.stop_token_ids == (9,)


def test_seeds_differ_unless_given() -> None:
    assert plans()[0].sampling.seed != plans()[0].sampling.seed


def test_chat_takes_the_newer_name_of_max_tokens() -> None:
    body = {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}
    [plan] = plan_choices(MODEL, parse_request(ChatRequest, body), [(5,)])
    assert plan.sampling.max_tokens == 4


def say(text: str, finish: FinishReason | None = None, **fields: Any) -> tuple[str, str | None]:
    """Feed text as single tokens; the text that came out and the finish reason."""
    [plan] = plans(max_tokens=100, **fields)
    assert MODEL.tokenizer is not None
    choice = ChoiceText(plan, MODEL.tokenizer)
    ids = MODEL.tokenizer.encode(text, add_special_tokens=False)
    out = ""
    for position, token_id in enumerate(ids):
        last = position + 1 == len(ids)
        token = Token(
            seq_id=0, position=position, token_id=token_id, finish=finish if last else None
        )
        delta = choice.push(token)
        out += delta.text
        if delta.finish is not None:
            return out, delta.finish
    return out, None


def test_text_of_a_choice() -> None:
    assert say("abcd") == ("abcd", None)
    assert say("abcd", FinishReason.LENGTH) == ("abcd", "length")
    # The stop token's own text is no part of the answer, unless it was asked for.
    assert say("abcd", FinishReason.STOP) == ("abc", "stop")
    assert say("abcd", FinishReason.STOP, include_stop_str_in_output=True) == ("abcd", "stop")


def test_stop_strings_of_a_choice() -> None:
    assert say("abcd", stop="bc") == ("a", "stop")
    assert say("abcd", stop=["cd", "bc"], include_stop_str_in_output=True) == ("abc", "stop")
    assert say("ab", stop="bc") == ("a", None)
    assert say("ab", FinishReason.LENGTH, stop="bc") == ("ab", "length")
    # Not within the first min_tokens tokens.
    assert say("abcabc", stop="bc", min_tokens=3) == ("abca", "stop")


def test_a_character_cut_off_at_the_end_is_replaced() -> None:
    [plan] = plans(max_tokens=1)
    assert MODEL.tokenizer is not None
    first = MODEL.tokenizer.encode("é", add_special_tokens=False)[0]
    token = Token(seq_id=0, position=0, token_id=first, finish=FinishReason.LENGTH)
    assert ChoiceText(plan, MODEL.tokenizer).push(token).text == "�"
