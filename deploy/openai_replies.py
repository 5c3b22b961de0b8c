"""Answers in OpenAI's shapes, as plain dicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.chat_parts import chunk_delta, message
from deploy.generation import ChoicePlan, Delta
from deploy.openai_errors import Json
from deploy.prompt_logprobs import PromptLogprobs, finite
from deploy.tokenizer import TextTokenizer
from deploy.version import VERSION
from router.step import Token


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyContext:
    """What every object of one response shares."""

    request_id: str
    model: str
    created: int
    tokenizer: TextTokenizer | None
    chat: bool
    num_logprobs: int | None
    num_prompt_logprobs: int | None
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


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, reasoning_tokens: int = 0
) -> Json:
    """Token counts; `cached_tokens` of the prompt were not computed again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
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


def choice(context: ReplyContext, plan: ChoicePlan, reply: ChoiceReply) -> Json:
    """One finished choice."""
    text = "".join(reply.text)
    body: Json = {"index": plan.index}
    if context.chat:
        body["message"] = message(plan.reading, reply.deltas)
    else:
        body["text"] = text if plan.echo is None else plan.echo.text + text
    body["logprobs"] = logprobs(context, plan, reply.deltas)
    body["finish_reason"] = reply.deltas[-1].finish
    if context.token_ids:
        body["token_ids"] = [delta.token.token_id for delta in reply.deltas if delta.has_token]
        if not context.chat:
            body["prompt_token_ids"] = list(plan.prompt)
    if not context.chat and context.num_prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs(context, reply)
    return body


def chunk_choice(context: ReplyContext, plan: ChoicePlan, delta: Delta) -> Json:
    """One choice of a streamed chunk; an echo comes with the first."""
    body: Json = {"index": plan.index}
    if context.chat:
        body["delta"] = chunk_delta(plan.reading, delta)
    else:
        echoed = plan.echo.text if plan.echo is not None and delta.is_first else ""
        body["text"] = echoed + delta.text
    body["logprobs"] = logprobs(context, plan, [delta])
    body["finish_reason"] = delta.finish
    if context.token_ids:
        body["token_ids"] = [delta.token.token_id] if delta.has_token else []
    return body


def role_choice(plan: ChoicePlan) -> Json:
    """The first chunk of a chat choice; one that may only call tools has no content yet."""
    content = "" if plan.reading.tool_format is None else None
    return {
        "index": plan.index,
        "delta": {"role": "assistant", "content": content},
        "logprobs": None,
        "finish_reason": None,
    }


def logprobs(context: ReplyContext, plan: ChoicePlan, deltas: list[Delta]) -> Json | None:
    """Log-probabilities in the route's own format, or None when they were not asked for."""
    if context.num_logprobs is None:
        return None
    tokens = [delta.token for delta in deltas if delta.has_token]
    if context.chat:
        content = [_chat_logprob(context, token) for token in tokens]
        return {"content": content, "refusal": None}
    echo = plan.echo
    before = 0 if echo is None else len(echo.text)
    legacy = _legacy(context, tokens)
    legacy["text_offset"] = [before + delta.offset for delta in deltas if delta.has_token]
    if echo is None or not deltas[0].is_first:
        return _with_tops(context, legacy)
    # Nothing predicts a prompt's first token.
    rest = PromptLogprobs.read(deltas[0].prompt or {}).tokens
    echoed = _legacy(context, rest)
    echoed["tokens"].insert(0, _label(context, plan.prompt[0]))
    echoed["token_logprobs"].insert(0, None)
    echoed["top_logprobs"].insert(0, None)
    echoed["text_offset"] = [*echo.offsets]
    return _with_tops(context, {key: [*v, *legacy[key]] for key, v in echoed.items()})


def prompt_logprobs(context: ReplyContext, reply: ChoiceReply) -> list[dict[str, Json] | None]:
    """vLLM's list for the prompt of a choice, of which `num_prompt_logprobs` were asked for."""
    assert context.num_prompt_logprobs is not None
    read = PromptLogprobs.read(reply.deltas[0].prompt or {})
    return read.as_vllm(context.num_prompt_logprobs, context.tokenizer)


def _legacy(context: ReplyContext, tokens: Sequence[Token]) -> dict[str, list[Any]]:
    return {
        "tokens": [_label(context, token.token_id) for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [_top_by_label(context, token) for token in tokens],
    }


def _with_tops(context: ReplyContext, legacy: dict[str, list[Any]]) -> Json:
    """Null where no alternatives were asked for: the clients' type has lists of objects alone."""
    return legacy if context.num_logprobs else {**legacy, "top_logprobs": None}


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
        "logprob": finite(value),
        "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
    }


def _top_by_label(context: ReplyContext, token: Token) -> dict[str, Any] | None:
    if not context.num_logprobs:
        return None
    # The sampled token is always there, even when it is not among the best.
    labels = {_label(context, token.token_id): finite(token.logprob)}
    for token_id, value in token.top_logprobs[: context.num_logprobs]:
        labels.setdefault(_label(context, token_id), finite(value))
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
