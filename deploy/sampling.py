"""From a request's fields and the checkpoint's defaults to sampling parameters."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence

from deploy.openai_errors import ApiError
from deploy.openai_schema import ChatRequest, CompletionRequest
from deploy.served_model import ServedModel
from deploy.tokenizer import TextTokenizer
from router.step import SamplingParams

_SEED_BITS = 63


def sampling_params(model: ServedModel, request: ChatRequest | CompletionRequest) -> SamplingParams:
    """All but `max_tokens` and `sample_idx`, which differ by choice. Raises ApiError."""
    defaults = model.defaults
    eos = () if request.ignore_eos else defaults.eos_token_ids
    allowed = tuple(request.allowed_token_ids or ())
    _check_ids(model, "allowed_token_ids", allowed)
    _check_ids(model, "stop_token_ids", request.stop_token_ids or ())
    return SamplingParams(
        max_tokens=0,
        min_tokens=request.min_tokens,
        temperature=_or(request.temperature, defaults.temperature),
        top_p=_or(request.top_p, defaults.top_p),
        top_k=defaults.top_k if request.top_k is None else max(0, request.top_k),
        min_p=_or(request.min_p, defaults.min_p),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(model, request.logit_bias or {}),
        bad_words=_bad_words(model, request.bad_words or ()),
        allowed_token_ids=allowed,
        seed=secrets.randbits(_SEED_BITS) if request.seed is None else request.seed % 2**_SEED_BITS,
        stop_token_ids=tuple(dict.fromkeys((*eos, *(request.stop_token_ids or ())))),
        logprobs=(
            request.wanted_logprobs if isinstance(request, ChatRequest) else request.logprobs
        ),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(model: ServedModel, biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """OpenAI's token ids as strings, in rising order."""
    by_id = {_token_id(model, key): bias for key, bias in biases.items()}
    _check_ids(model, "logit_bias", by_id)
    return tuple(sorted(by_id.items()))


def _token_id(model: ServedModel, key: str) -> int:
    """Written as JSON writes it: of "1", " 1" and "01" all but one would be dropped silently."""
    try:
        token_id = int(key)
    except ValueError:
        token_id = -1
    if str(token_id) != key:
        raise ApiError(
            f"logit_bias: keys must be token ids, 0..{model.vocab_size - 1}", param="logit_bias"
        )
    return token_id


def _bad_words(model: ServedModel, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word's token ids at the beginning of a text, and after a space where that differs."""
    if not words:
        return ()
    tokenizer = model.need_tokenizer("bad_words")
    spellings = (ids for word in words for ids in _spellings(tokenizer, word))
    return tuple(dict.fromkeys(ids for ids in spellings if ids))


def _spellings(tokenizer: TextTokenizer, word: str) -> Iterable[tuple[int, ...]]:
    for text in (word, " " + word.lstrip()):
        yield tokenizer.encode(text, add_special_tokens=False, param="bad_words")


def _check_ids(model: ServedModel, param: str, token_ids: Iterable[int]) -> None:
    worst = next((t for t in token_ids if not 0 <= t < model.vocab_size), None)
    if worst is not None:
        raise ApiError(
            f"{param}: token id {worst} is out of range, allowed are 0..{model.vocab_size - 1}",
            param=param,
        )
