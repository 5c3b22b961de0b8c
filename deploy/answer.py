"""A generating request's choices on their way to one body, or to the chunks of a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deploy.admission import Work
from deploy.gate import Place
from deploy.generation import ChoicePlan, Delta, run_choices
from deploy.metrics import AnswerMeter
from deploy.openai_errors import (
    ApiError,
    Json,
    not_finite,
    reader_too_slow,
    recovering,
    request_failed_worker,
)
from deploy.openai_replies import (
    ChoiceReply,
    ReplyContext,
    choice,
    chunk_choice,
    envelope,
    prompt_logprobs,
    role_choice,
    usage,
)
from router.step import NOTHING
from shards.client import (
    GroupFailed,
    GroupUnavailable,
    ReaderTooSlow,
    SequenceFailed,
    SequenceRefused,
    TokenSource,
    WorkerKilled,
)

log = logging.getLogger("conclave.ingress")


class Answer:
    """Runs the plans of one request; use `collect` or `stream`, once. Its end leaves the `place`.

    What holds a prompt's log-probabilities, often many objects, is built off the loop.
    """

    def __init__(
        self,
        client: TokenSource,
        place: Place,
        context: ReplyContext,
        plans: Sequence[ChoicePlan],
        prompts: Sequence[tuple[int, ...]],
        meter: AnswerMeter,
    ) -> None:
        self._client = client
        self._place = place
        self._context = context
        self._plans = plans
        self._prompts = prompts
        self._meter = meter

    async def collect(self) -> Json:
        """The whole body. Raises ApiError."""
        replies = [ChoiceReply() for _ in self._plans]
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                replies[delta.index].add(delta)
        if all(plan.want == NOTHING for plan in self._plans):
            return self._body(replies)
        return await asyncio.to_thread(self._body, replies)

    async def stream(self) -> AsyncGenerator[Json, None]:
        """Chunks as they come. Raises ApiError."""
        context = self._context
        num_completion = num_cached = num_reasoning = 0
        started: set[int] = set()

        def chunk(choices: list[Json], *, last: bool = False) -> Json:
            body = envelope(context, choices, chunk=True)
            if last or context.continuous_usage:
                counts = (num_completion, num_cached, num_reasoning)
                body["usage"] = usage(self._num_prompt(), *counts)
            elif context.include_usage:
                body["usage"] = None
            return body if started else self._with_extras(body)

        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                num_completion += delta.has_token
                num_cached += self._cached(delta)
                num_reasoning += delta.has_token and delta.thinking
                if context.chat and delta.index not in started:
                    yield chunk([role_choice(self._plans[delta.index])])
                    started.add(delta.index)
                if _worth_sending(context, self._plans[delta.index], delta):
                    yield chunk([await self._chunk_choice(delta)])
                    started.add(delta.index)
        if context.include_usage:
            yield chunk([], last=True)

    async def _chunk_choice(self, delta: Delta) -> Json:
        plan = self._plans[delta.index]
        if delta.prompt is None:
            return chunk_choice(self._context, plan, delta)
        return await asyncio.to_thread(chunk_choice, self._context, plan, delta)

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            self._meter.start(self._prompts)
            deltas = run_choices(self._client, self._plans, self._context.tokenizer)
            async with aclosing(deltas):
                async for delta in deltas:
                    self._place.saw_token(delta.index)
                    self._meter.see(delta)
                    yield delta
        except SEQUENCE_ERRORS as error:
            raise api_error(error) from error
        finally:
            self._place.leave()

    def _body(self, replies: Sequence[ChoiceReply]) -> Json:
        context = self._context
        choices = [choice(context, p, r) for p, r in zip(self._plans, replies, strict=True)]
        body = envelope(context, choices, chunk=False)
        deltas = [delta for reply in replies for delta in reply.deltas]
        completion = sum(delta.has_token for delta in deltas)
        cached = sum(map(self._cached, deltas))
        reasoning = sum(delta.has_token and delta.thinking for delta in deltas)
        body["usage"] = usage(self._num_prompt(), completion, cached, reasoning)
        if context.chat and context.num_prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(context, replies[0])
        return self._with_extras(body)

    def _cached(self, delta: Delta) -> int:
        """A prompt counts once, however many answers it gets, and so does what was there of it."""
        is_first = self._plans[delta.index].sampling.sample_idx == 0
        return delta.token.num_cached if is_first else 0

    def _num_prompt(self) -> int:
        return sum(map(len, self._prompts))

    def _with_extras(self, body: Json) -> Json:
        if self._context.token_ids and len(self._prompts) == 1:
            body["prompt_token_ids"] = list(self._prompts[0])
        if self._context.warnings:
            body["warnings"] = list(self._context.warnings)
        return body


def works(plans: Sequence[ChoicePlan]) -> list[Work]:
    """What the plans ask of the engine."""
    return [Work(prompt_tokens=len(p.prompt), max_tokens=p.sampling.max_tokens) for p in plans]


SequenceError = SequenceRefused | SequenceFailed | GroupUnavailable | GroupFailed
SEQUENCE_ERRORS = (SequenceRefused, SequenceFailed, GroupUnavailable, GroupFailed)


def api_error(error: SequenceError) -> ApiError:
    """What the caller is told of a sequence that did not end as it should."""
    if isinstance(error, SequenceRefused):
        return ApiError(str(error), code="sequence_refused")
    if isinstance(error, WorkerKilled):
        return request_failed_worker()
    if isinstance(error, ReaderTooSlow):
        return reader_too_slow()
    if isinstance(error, SequenceFailed):
        return not_finite()
    if isinstance(error, GroupUnavailable):
        return recovering(error)
    log.error("the model instance failed: %s", error)
    return ApiError(
        "The model instance failed; the server's log says why.",
        status=503,
        kind="service_unavailable_error",
        code="model_failed",
        retry_after=10,
    )


def _worth_sending(context: ReplyContext, plan: ChoicePlan, delta: Delta) -> bool:
    detailed = context.token_ids or context.num_logprobs is not None or context.continuous_usage
    # Without a tokenizer no chunk has text; they show that tokens come.
    detailed = detailed or context.tokenizer is None
    echoes = plan.echo is not None and delta.is_first
    brings = delta.text or delta.reasoning or delta.calls or delta.finish is not None
    return detailed or echoes or bool(brings)
