"""The API without a web server: dicts in, dicts (or streams of dicts) out."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from deploy.admission import Admission
from deploy.generation import ChoicePlan, Delta, plan_choices, run_choices
from deploy.openai_errors import ApiError, Json
from deploy.openai_replies import (
    ChoiceReply,
    ReplyContext,
    choice,
    chunk_choice,
    envelope,
    role_choice,
    usage,
)
from deploy.openai_schema import ChatRequest, CompletionRequest, parse_request
from deploy.served_model import ServedModel
from shards.client import GroupFailed, GroupState, ModelClient, SequenceRefused

log = logging.getLogger("conclave.ingress")

_WAITING_PER_RUNNING = 16


class ApiService:
    """Answers requests for one model from one running model instance."""

    def __init__(
        self,
        client: ModelClient,
        model: ServedModel,
        *,
        max_num_seqs: int,
        replica_id: str = "",
        build: Mapping[str, Any] | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._admission = Admission(max_num_seqs, _WAITING_PER_RUNNING * max_num_seqs)
        self._replica_id = replica_id
        self._build = dict(build or {})

    @property
    def state(self) -> GroupState:
        """The model instance's state."""
        return self._client.state

    async def chat(self, body: object) -> Json | AsyncGenerator[Json, None]:
        """/v1/chat/completions: the response, or its chunks with `stream`. Raises ApiError."""
        request = parse_request(ChatRequest, body)
        self._check_model(request.model)
        prompt = await asyncio.to_thread(self._chat_prompt, request)
        return await self._answer(request, [prompt])

    async def completions(self, body: object) -> Json | AsyncGenerator[Json, None]:
        """/v1/completions: the response, or its chunks with `stream`. Raises ApiError."""
        request = parse_request(CompletionRequest, body)
        self._check_model(request.model)
        prompts = await asyncio.to_thread(self._text_prompts, request)
        return await self._answer(request, prompts)

    def models(self) -> Json:
        """/v1/models."""
        return {"object": "list", "data": [self._model_card()]}

    def model(self, name: str) -> Json:
        """/v1/models/{name}. Raises ApiError 404."""
        self._check_model(name)
        return self._model_card()

    def experts(self) -> Json:
        """/v1/experts: who holds what, and how much there is to do."""
        return {
            "replica_id": self._replica_id,
            "routing_table_version": self._client.routing_table_version,
            "actors": [asdict(worker) for worker in self._client.workers()],
            "load": asdict(self._client.load),
        }

    def version(self) -> Json:
        """/version: what decides the bits of an answer."""
        return dict(self._build)

    def _model_card(self) -> Json:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "conclave",
            "root": self._model.path,
            "parent": None,
            "max_model_len": self._model.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise ApiError(
                f"The model `{name}` does not exist; this server has `{self._model.name}`.",
                status=404,
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def _chat_prompt(self, request: ChatRequest) -> tuple[int, ...]:
        tokenizer = self._model.need_tokenizer("messages")
        text = self._model.need_template().render(
            [message.for_template() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            documents=request.documents,
            variables=request.chat_template_kwargs,
        )
        # The template writes its own special tokens: adding them again would double Jamba's BOS.
        special = request.add_special_tokens
        return tokenizer.encode(text, add_special_tokens=special, param="messages")

    def _text_prompts(self, request: CompletionRequest) -> list[tuple[int, ...]]:
        prompts: list[tuple[int, ...]] = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                tokenizer = self._model.need_tokenizer("prompt")
                special = request.add_special_tokens
                ids = tokenizer.encode(prompt, add_special_tokens=special, param="prompt")
                prompts.append(ids)
            else:
                prompts.append(tuple(prompt))
        return prompts

    async def _answer(
        self, request: ChatRequest | CompletionRequest, prompts: list[tuple[int, ...]]
    ) -> Json | AsyncGenerator[Json, None]:
        plans = plan_choices(self._model, request, prompts)
        self._check_ready()
        self._admission.check(len(plans))
        context = self._context(request)
        if not request.stream:
            return await self._collect(context, plans, prompts)
        chunks = self._stream(context, plans, prompts)
        # The first chunk waits for the first token, so that a refusal is still a plain error.
        try:
            first = await anext(chunks)
        except BaseException:
            await chunks.aclose()
            raise
        return _chain(first, chunks)

    def _check_ready(self) -> None:
        state = self._client.state
        if state not in (GroupState.READY, GroupState.RECOVERING):
            raise ApiError(
                f"The model instance is {state}.",
                status=503,
                kind="service_unavailable_error",
                code=f"model_{state}",
                retry_after=5,
            )

    def _context(self, request: ChatRequest | CompletionRequest) -> ReplyContext:
        chat = isinstance(request, ChatRequest)
        options = request.stream_options
        return ReplyContext(
            request_id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            model=self._model.name,
            created=int(time.time()),
            tokenizer=self._model.tokenizer,
            chat=chat,
            num_logprobs=(
                request.wanted_logprobs if isinstance(request, ChatRequest) else request.logprobs
            ),
            tokens_as_ids=bool(request.return_tokens_as_token_ids),
            token_ids=bool(request.return_token_ids),
            include_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.continuous_usage_stats,
            warnings=tuple(
                f"unknown field {name} has no effect" for name in request.unknown_fields
            ),
        )

    async def _collect(
        self, context: ReplyContext, plans: list[ChoicePlan], prompts: list[tuple[int, ...]]
    ) -> Json:
        replies = [ChoiceReply() for _ in plans]
        with self._admission.hold(len(plans)):
            deltas = run_choices(self._client, plans, self._model.tokenizer)
            async with aclosing(deltas):
                try:
                    async for delta in deltas:
                        replies[delta.index].add(delta)
                except (SequenceRefused, GroupFailed) as error:
                    raise _api_error(error) from error
        choices = [
            choice(context, plan.index, reply, plan.prompt)
            for plan, reply in zip(plans, replies, strict=True)
        ]
        body = envelope(context, choices, chunk=False)
        body["usage"] = usage(sum(map(len, prompts)), sum(len(r.deltas) for r in replies))
        return _with_extras(body, context, prompts)

    async def _stream(
        self, context: ReplyContext, plans: list[ChoicePlan], prompts: list[tuple[int, ...]]
    ) -> AsyncGenerator[Json, None]:
        num_prompt, num_completion = sum(map(len, prompts)), 0
        started: set[int] = set()

        def chunk(choices: list[Json], *, last: bool = False) -> Json:
            body = envelope(context, choices, chunk=True)
            if last or context.continuous_usage:
                body["usage"] = usage(num_prompt, num_completion)
            elif context.include_usage:
                body["usage"] = None
            return body if started else _with_extras(body, context, prompts)

        with self._admission.hold(len(plans)):
            deltas = run_choices(self._client, plans, self._model.tokenizer)
            async with aclosing(deltas):
                try:
                    async for delta in deltas:
                        num_completion += 1
                        if context.chat and delta.index not in started:
                            yield chunk([role_choice(delta.index)])
                            started.add(delta.index)
                        if _worth_sending(context, delta):
                            yield chunk([chunk_choice(context, delta)])
                            started.add(delta.index)
                except (SequenceRefused, GroupFailed) as error:
                    raise _api_error(error) from error
        if context.include_usage:
            yield chunk([], last=True)


def _worth_sending(context: ReplyContext, delta: Delta) -> bool:
    detailed = context.token_ids or context.num_logprobs is not None or context.continuous_usage
    return detailed or bool(delta.text) or delta.finish is not None


def _with_extras(body: Json, context: ReplyContext, prompts: list[tuple[int, ...]]) -> Json:
    if context.token_ids and len(prompts) == 1:
        body["prompt_token_ids"] = list(prompts[0])
    if context.warnings:
        body["warnings"] = list(context.warnings)
    return body


async def _chain(first: Json, rest: AsyncGenerator[Json, None]) -> AsyncGenerator[Json, None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


def _api_error(error: SequenceRefused | GroupFailed) -> ApiError:
    if isinstance(error, SequenceRefused):
        return ApiError(str(error), code="sequence_refused")
    log.error("the model instance failed: %s", error)
    return ApiError(
        "The model instance failed; the server's log says why.",
        status=503,
        kind="service_unavailable_error",
        code="model_failed",
        retry_after=10,
    )
