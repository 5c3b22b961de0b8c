"""Answers in OpenAI's shapes, as plain dicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deploy.generation import Delta
from deploy.openai_errors import Json
from deploy.tokenizer import TextTokenizer
from deploy.version import VERSION
from router.step import Token

# What JSON cannot say; OpenAI and vLLM write the same number for "impossible".
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyContext:
    """What every object of one response shares."""

    request_id: str
    model: str
    created: int
    tokenizer: TextTokenizer | None
    chat: bool
    num_logprobs: int | None
    tokens_as_ids: bool
    token_ids: bool
    include_usage: bool = False
    continuous_usage: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class ChoiceReply:
    """One choice of a response that is not streamed, as its deltas come in."""

    text: list[str] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text.append(delta.text)
        self.deltas.append(delta)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; nothing is cached or hidden reasoning yet."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def envelope(context: ReplyContext, choices: list[Json], *, chunk: bool) -> Json:
    """The object around choices."""
    if context.chat:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    else:
        kind = "text_completion"
    return {
        "id": context.request_id,
        "object": kind,
        "created": context.created,
        "model": context.model,
        "system_fingerprint": f"conclave-{VERSION}",
        "choices": choices,
    }


def choice(context: ReplyContext, index: int, reply: ChoiceReply, prompt: tuple[int, ...]) -> Json:
    """One finished choice."""
    text = "".join(reply.text)
    body: Json = {"index": index}
    if context.chat:
        body["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        body["text"] = text
    body["logprobs"] = logprobs(context, reply.deltas)
    body["finish_reason"] = reply.deltas[-1].finish
    if context.token_ids:
        body["token_ids"] = [delta.token.token_id for delta in reply.deltas]
        if not context.chat:
            body["prompt_token_ids"] = list(prompt)
    return body


def chunk_choice(context: ReplyContext, delta: Delta) -> Json:
    """One choice of a streamed chunk."""
    body: Json = {"index": delta.index}
    if context.chat:
        body["delta"] = {"content": delta.text} if delta.text or delta.finish is None else {}
    else:
        body["text"] = delta.text
    body["logprobs"] = logprobs(context, [delta])
    body["finish_reason"] = delta.finish
    if context.token_ids:
        body["token_ids"] = [delta.token.token_id]
    return body


def role_choice(index: int) -> Json:
    """The first chunk of a chat choice."""
    return {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def logprobs(context: ReplyContext, deltas: list[Delta]) -> Json | None:
    """Log-probabilities in the route's own format, or None when they were not asked for."""
    if context.num_logprobs is None:
        return None
    if context.chat:
        return {"content": [_chat_logprob(context, delta.token) for delta in deltas]}
    return {
        "tokens": [_label(context, delta.token.token_id) for delta in deltas],
        "token_logprobs": [_finite(delta.token.logprob) for delta in deltas],
        "top_logprobs": [_top_by_label(context, delta.token) for delta in deltas],
        "text_offset": [delta.offset for delta in deltas],
    }


def _chat_logprob(context: ReplyContext, token: Token) -> Json:
    best = token.top_logprobs[: context.num_logprobs]
    return {
        **_entry(context, token.token_id, token.logprob),
        "top_logprobs": [_entry(context, token_id, value) for token_id, value in best],
    }


def _entry(context: ReplyContext, token_id: int, value: float | None) -> Json:
    tokenizer = context.tokenizer
    return {
        "token": _label(context, token_id),
        "logprob": _finite(value),
        "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
    }


def _top_by_label(context: ReplyContext, token: Token) -> dict[str, Any] | None:
    if not context.num_logprobs:
        return None
    # The sampled token is always there, even when it is not among the best.
    labels = {_label(context, token.token_id): _finite(token.logprob)}
    for token_id, value in token.top_logprobs[: context.num_logprobs]:
        labels.setdefault(_label(context, token_id), _finite(value))
    return labels


def _label(context: ReplyContext, token_id: int) -> str:
    if context.tokens_as_ids or context.tokenizer is None:
        return f"token_id:{token_id}"
    raw = context.tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        # OpenAI's spelling of a token that is a part of a character.
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST_LOGPROB)
