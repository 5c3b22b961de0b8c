"""From a checked request to sequences: sampling parameters, stop conditions, text of choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import zip_longest

from deploy.answer_reader import PLAIN, AnswerReader, Reading
from deploy.compute import Arrays
from deploy.openai_errors import ApiError
from deploy.openai_schema import ChatRequest, CompletionRequest
from deploy.prompts import Echo, check_tokens, too_long
from deploy.sampling import sampling_params
from deploy.served_model import ServedModel
from deploy.stop_strings import StopMatcher
from deploy.tokenizer import Detokenizer, TextTokenizer
from deploy.tool_calls import CallDelta
from deploy.truncation import COMPLETION_MAX_TOKENS
from router.step import NO_TOKEN, NOTHING, FinishReason, SamplingParams, Token, Want
from shards.client import TokenSource

_TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicePlan:
    """One sequence to generate and how its tokens become text."""

    index: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int
    cache_salt: str
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    want: Want = NOTHING
    grammar: str | None = None
    """What llguidance's `LLMatcher` takes; None: any text."""
    echo: Echo | None = None
    reading: Reading = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One token's contribution to a choice; `text`, of its content, may lag behind or run empty.

    `offset` is where the token's own text begins in the text that was generated. `prompt` holds
    what was wanted of the prompt, `queue_seconds` how long the sequence waited for its first step:
    both come with the first delta.
    """

    index: int
    token: Token
    text: str
    offset: int
    finish: str | None
    prompt: Arrays | None = None
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    thinking: bool = False
    """Whether the token belongs to the reasoning."""
    queue_seconds: float | None = None

    @property
    def is_first(self) -> bool:
        """Whether nothing of this choice has come before."""
        return self.token.position == 0

    @property
    def has_token(self) -> bool:
        """False for the end of a choice of which nothing was to be generated."""
        return self.token.token_id != NO_TOKEN


def plan_choices(
    model: ServedModel,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[tuple[int, ...]],
    echoes: Sequence[Echo] = (),
    grammar: str | None = None,
    reading: Reading = PLAIN,
) -> list[ChoicePlan]:
    """`n` sequences per prompt, numbered as OpenAI does; `echoes` are the prompts' own, if any.

    Every answer keeps to `grammar`. Raises ApiError.
    """
    if request.stop_strings:
        model.need_tokenizer("stop")
    if grammar is not None and request.ignore_eos:
        raise ApiError(
            "ignore_eos: not allowed here, for a constrained answer ends where its form does",
            param="ignore_eos",
        )
    n = request.n or 1
    plans: list[ChoicePlan] = []
    sampling = sampling_params(model, request)
    want = _want(request)
    for prompt, echo in zip_longest(prompts, echoes):
        max_tokens = _max_tokens(model, request, prompt)
        for sample_idx in range(n):
            plans.append(
                ChoicePlan(
                    index=len(plans),
                    prompt=prompt,
                    sampling=replace(sampling, max_tokens=max_tokens, sample_idx=sample_idx),
                    priority=request.priority,
                    cache_salt=request.cache_salt or "",
                    stops=request.stop_strings,
                    include_stop=request.include_stop_str_in_output,
                    skip_special_tokens=request.skip_special_tokens,
                    want=want,
                    grammar=grammar,
                    echo=echo,
                    reading=reading,
                )
            )
    return plans


def _want(request: ChatRequest | CompletionRequest) -> Want:
    """What is wanted of the prompt: its own log-probabilities, for the API's two ways to ask."""
    asked = [] if request.prompt_logprobs is None else [request.prompt_logprobs]
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        asked.append(request.logprobs)
    return Want(prompt_logprobs=max(asked)) if asked else NOTHING


def _max_tokens(
    model: ServedModel, request: ChatRequest | CompletionRequest, prompt: tuple[int, ...]
) -> int:
    """Tokens this sequence may emit. Raises ApiError when prompt or answer cannot fit."""
    chat = isinstance(request, ChatRequest)
    where = "messages" if chat else "prompt"
    check_tokens(model, prompt, where)
    room = model.max_model_len - len(prompt)
    if room < (0 if request.max_tokens == 0 else 1):
        raise too_long(model, f"the prompt has {len(prompt)} tokens", where)
    key, wanted = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        key, wanted = "max_completion_tokens", request.max_completion_tokens
    if wanted is not None and wanted > room:
        asked = f"{len(prompt)} in the prompt and {wanted} in {key} were requested"
        raise too_long(model, asked, key)
    if wanted is None:
        wanted = room if chat else min(room, COMPLETION_MAX_TOKENS)
    if request.min_tokens > wanted:
        raise ApiError(f"min_tokens: must not exceed max_tokens={wanted}", param="min_tokens")
    return wanted


class ChoiceText:
    """Turns one sequence's tokens into deltas: detokenizes, and ends it at a stop string."""

    def __init__(self, plan: ChoicePlan, tokenizer: TextTokenizer | None) -> None:
        self._plan = plan
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(
                tokenizer,
                skip_special_tokens=plan.skip_special_tokens,
                visible_ids=plan.reading.visible_ids,
            )
        )
        self._matcher = StopMatcher(plan.stops, include=plan.include_stop)
        self._reader = None if plan.reading == PLAIN else AnswerReader(plan.reading)
        self._decoded = 0

    def push(self, token: Token) -> Delta:
        """The delta of the next token; its `finish` ends the choice."""
        offset = self._decoded
        # A stop token is not part of the answer; the last token of a grammar is.
        is_stop = token.token_id in self._plan.sampling.stop_token_ids
        is_stop = is_stop or self._plan.grammar is None
        hidden = token.finish is FinishReason.STOP and is_stop and not self._plan.include_stop
        hidden = hidden or token.token_id == NO_TOKEN
        text = "" if hidden or self._detokenizer is None else self._detokenizer.push(token.token_id)
        if token.finish is not None and self._detokenizer is not None:
            text += self._detokenizer.flush()
        self._decoded += len(text)
        # As in vLLM, stop strings count only beyond the first min_tokens tokens.
        if token.position + 1 > self._plan.sampling.min_tokens:
            text = self._matcher.push(text)
        finish = None if token.finish is None else str(token.finish)
        if self._matcher.matched is not None:
            finish = str(FinishReason.STOP)
        elif finish is not None:
            text += self._matcher.flush()
        delta = Delta(index=self._plan.index, token=token, text=text, offset=offset, finish=finish)
        return delta if self._reader is None else _read(self._reader, delta)


def _read(reader: AnswerReader, delta: Delta) -> Delta:
    """The delta with its text divided into parts; calls that are made are why it ends."""
    was_thinking = reader.thinking
    parts = reader.push(delta.text, last=delta.finish is not None)
    finish = delta.finish
    if reader.done or (reader.has_called and finish == str(FinishReason.STOP)):
        finish = _TOOL_CALLS
    return replace(
        delta,
        text=parts.content,
        reasoning=parts.reasoning,
        calls=parts.calls,
        thinking=was_thinking or reader.thinking,
        finish=finish,
    )


async def run_choice(
    client: TokenSource, plan: ChoicePlan, tokenizer: TextTokenizer | None
) -> AsyncGenerator[Delta, None]:
    """Generate one sequence; leaving early, for whatever reason, aborts it."""
    text = ChoiceText(plan, tokenizer)
    stream = client.generate(
        plan.prompt,
        plan.sampling,
        priority=plan.priority,
        want=plan.want,
        grammar=plan.grammar,
        cache_salt=plan.cache_salt,
    )
    try:
        async for token in stream:
            delta = text.push(token)
            if delta.is_first:
                prompt = stream.outputs if plan.want != NOTHING else None
                delta = replace(delta, prompt=prompt, queue_seconds=stream.queue_seconds)
            yield delta
            if delta.finish is not None:
                return
    finally:
        stream.abort()


async def run_choices(
    client: TokenSource, plans: Sequence[ChoicePlan], tokenizer: TextTokenizer | None
) -> AsyncGenerator[Delta, None]:
    """Deltas of all sequences as they come; the first error ends them all."""
    if len(plans) == 1:
        async with aclosing(run_choice(client, plans[0], tokenizer)) as deltas:
            async for delta in deltas:
                yield delta
        return
    # Bounded: what a slow reader has not taken waits in the sequences' own streams.
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(2 * len(plans))

    async def pump(plan: ChoicePlan) -> None:
        try:
            async with aclosing(run_choice(client, plan, tokenizer)) as deltas:
                async for delta in deltas:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(plan)) for plan in plans]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
