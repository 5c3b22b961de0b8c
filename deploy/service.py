"""The API without a web server: dicts in, dicts (or streams of dicts) out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.admission import Admission, AdmissionLimits, Work
from deploy.answer import SEQUENCE_ERRORS, Answer, api_error, works
from deploy.answer_grammar import answer_grammar, asks_grammar
from deploy.classify import classify_body, classify_computations, classify_inputs
from deploy.compute import Arrays, Computation, StepBudget, compute
from deploy.dispatch_costs import dispatch_costs
from deploy.forward import Outputs, plan_forward
from deploy.gate import Gate, Place
from deploy.generation import plan_choices
from deploy.metrics import AnswerMeter, Metrics
from deploy.model_facts import ModelFacts
from deploy.openai_errors import ApiError, Json, not_finite, recovering
from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest, parse_request
from deploy.patient_stream import PatientStream
from deploy.predicted_work import num_sequences, predicted_works, text_size
from deploy.prompts import Echo, Prompt, chat_prompt, text_prompts
from deploy.reply_context import reply_context
from deploy.request_record import current_record
from deploy.served_model import ServedModel
from deploy.text_threads import TextLanes, TextThreads
from deploy.tokenization import check_id_count, detokenize_body, tokenize_body
from deploy.tokenize_schema import DetokenizeRequest, TokenizeRequest
from deploy.user_config import Settings
from shards.client import GroupState, ModelClient
from shards.cores import available_cores

if TYPE_CHECKING:
    from deploy.tracing import Tracing

_WAITING_PER_RUNNING = 16
_SHORT_ASIDES, _LONG_ASIDES = 64, 4
"""Texts of /tokenize and /detokenize that wait: they are not admitted as sequences are."""


class ApiService:
    """Answers requests for one model from one running model instance."""

    def __init__(
        self,
        client: ModelClient,
        model: ServedModel,
        facts: ModelFacts,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        replica_id: str = "",
        build: Mapping[str, Any] | None = None,
        strict: bool = False,
        block_size: int = 1,
        max_queue_s: float = 120.0,
        keep_alive_s: float = 15.0,
        tracing: Tracing | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._facts = facts
        self._max_batched_tokens = max_num_batched_tokens
        self._admission = Admission(
            AdmissionLimits(
                num_seats=max_num_seqs,
                max_waiting=_WAITING_PER_RUNNING * max_num_seqs,
                block_size=block_size,
                max_queue_s=max_queue_s,
            )
        )
        self._gate = Gate(client, self._admission)
        self._budget = StepBudget()
        self._text = TextLanes(available_cores())
        self._asides = TextLanes(1, most_waiting=(_SHORT_ASIDES, _LONG_ASIDES))
        # Apart from the others: they wait for each other's turn to be compiled.
        self._grammars = TextThreads(2)
        self._replica_id = replica_id
        self._build = dict(build or {})
        self._shown: Mapping[str, Any] = {}
        self.strict = strict
        self.keep_alive_s = keep_alive_s
        """After so long without a chunk a stream says that it lives."""
        self.metrics = Metrics(client, replica_id)
        self.tracing = tracing
        if tracing is not None:
            tracing.on_dropped = self.metrics.dropped_spans.inc

    @property
    def admission(self) -> Admission:
        """Who is under way, and how fast this replica has been."""
        return self._admission

    @property
    def state(self) -> GroupState:
        """The model instance's state."""
        return self._client.state

    @property
    def settings(self) -> Settings:
        """By which requests that begin now are answered."""
        return Settings(model=self._model, limits=self._admission.limits)

    def adopt(self, settings: Settings) -> None:
        """Answer by other settings; requests under way keep theirs. Call on the event loop."""
        self._model, self._admission.limits = settings.model, settings.limits
        self._shown = settings.shown

    @property
    def health(self) -> Json:
        """/health: the state, and what is wrong with it, if anything is."""
        failure, trouble = self._client.failure, self._client.trouble
        if failure:
            return {"state": str(self.state), "reason": failure}
        return {"state": str(self.state), **(asdict(trouble) if trouble is not None else {})}

    async def chat(self, body: object) -> Json | PatientStream:
        """/v1/chat/completions: the response, or its chunks with `stream`. Raises ApiError."""
        request = parse_request(ChatRequest, body, strict=self.strict)
        self._check_model(request.model)
        self._facts.need_lm_head()
        model = self._model  # the whole request sees one
        return await self._generate(model, request, "n", lambda: [chat_prompt(model, request)])

    async def completions(self, body: object) -> Json | PatientStream:
        """/v1/completions: the response, or its chunks with `stream`. Raises ApiError."""
        request = parse_request(CompletionRequest, body, strict=self.strict)
        self._check_model(request.model)
        self._facts.need_lm_head()
        param = "n" if len(request.prompts) == 1 else "prompt"
        model = self._model
        return await self._generate(
            model, request, param, lambda: text_prompts(model, request, "prompt")
        )

    async def classify(self, body: object) -> Json:
        """/v1/classify: what the classification head says of each input. Raises ApiError."""
        request = parse_request(ClassifyRequest, body, strict=self.strict)
        self._check_model(request.model)
        label_set = self._facts.need_labels()
        param = "input" if request.messages is None else "messages"
        place, size = self._take(request, param)
        try:
            inputs = await self._text.run(size, classify_inputs, self._model, request, param)
            computations = classify_computations(inputs, label_set, request.priority)
            rows = await self._compute(computations, place)
        finally:
            place.leave()
        scores = [row["score"][0].astype(np.float32) for row in rows]
        if not all(np.isfinite(row).all() for row in scores):
            raise not_finite()
        return classify_body(self._model, request, label_set, inputs, scores)

    async def tokenize(self, body: object) -> Json:
        """/tokenize: the tokens of a prompt or a chat. Raises ApiError."""
        request = parse_request(TokenizeRequest, body, strict=self.strict)
        self._check_model(request.model)
        size = text_size(request)
        return await self._asides.run(size, tokenize_body, self._model, request)

    async def detokenize(self, body: object) -> Json:
        """/detokenize: the text of tokens. Raises ApiError."""
        check_id_count(body, self._model.max_model_len)  # a million types take their time
        request = parse_request(DetokenizeRequest, body, strict=self.strict)
        self._check_model(request.model)
        size = len(request.tokens)
        return await self._asides.run(size, detokenize_body, self._model, request)

    async def forward(self, body: object) -> Outputs:
        """One forward over a batch, as Transformers defines its outputs. Raises ApiError."""
        batch = await asyncio.to_thread(
            plan_forward, body, self._facts, self._model.max_model_len, self._max_batched_tokens
        )
        computations = batch.computations()
        self._check_ready()
        place = self._gate.take(_asked(computations), "input_ids")
        try:
            rows = await self._compute(computations, place)
        finally:
            place.leave()
        return await asyncio.to_thread(batch.outputs, rows)

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
            "kv_cache": self._client.cache_summary,
            "dispatch": dispatch_costs(self._client.layer_totals),
        }

    def version(self) -> Json:
        """/version: what decides the bits of an answer."""
        return {**self._build, **self._shown}

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

    async def _generate(
        self,
        model: ServedModel,
        request: ChatRequest | CompletionRequest,
        param: str,
        make_prompts: Callable[[], list[Prompt]],
    ) -> Json | PatientStream:
        place, size = self._take(request, param)
        try:
            prompts = await self._text.run(size, make_prompts)
            return await self._answer(model, request, prompts, place)
        except BaseException:
            place.leave()
            raise

    async def _answer(
        self,
        model: ServedModel,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        place: Place,
    ) -> Json | PatientStream:
        token_ids = [prompt.token_ids for prompt in prompts]
        echoes = self._echoes(request, prompts)
        reading = prompts[0].reading
        grammar = None
        if asks_grammar(request, reading):
            grammar = await self._grammars.run(answer_grammar, model, request, reading)
        plans = plan_choices(model, request, token_ids, echoes, grammar, reading)
        self._check_ready()
        place.settle(works(plans))
        record = current_record()
        meter = AnswerMeter(self.metrics, record)
        context = reply_context(model, request, record.request_id)
        source = record.watched(self._client)
        answer = Answer(source, place, context, plans, token_ids, meter)
        if not request.stream:
            return await answer.collect()
        record.stream = True
        stream = PatientStream(answer.stream())
        await stream.begin(self.keep_alive_s)
        return stream

    def _echoes(
        self, request: ChatRequest | CompletionRequest, prompts: list[Prompt]
    ) -> list[Echo]:
        if not isinstance(request, CompletionRequest) or not request.echo:
            return []
        skip = request.skip_special_tokens
        tokenizer = self._model.tokenizer
        return [Echo.of(prompt, tokenizer, skip_special_tokens=skip) for prompt in prompts]

    async def _compute(self, computations: Sequence[Computation], place: Place) -> list[Arrays]:
        """Run sequences. Raises ApiError."""
        self._check_ready()
        place.settle(_asked(computations))
        record = current_record()
        meter = AnswerMeter(self.metrics, record)
        source = record.watched(self._client)
        meter.start([each.tokens for each in computations])
        try:
            rows = await compute(source, self._budget, computations, meter.waited)
        except SEQUENCE_ERRORS as error:
            raise api_error(error) from error
        for index in range(len(rows)):
            place.saw_token(index)
        return rows

    def check_room(self) -> None:
        """Raises ApiError where no request at all would be admitted: 503 or 429."""
        self._check_ready()
        self._gate.check_room()

    def _take(
        self, request: ChatRequest | CompletionRequest | ClassifyRequest, param: str
    ) -> tuple[Place, int]:
        """A place before anything is tokenized, and about how many characters that will be."""
        # Their number first: a list of all of them may be too long to make.
        self._gate.admission.check_number(num_sequences(request), param)
        self._check_ready()
        return self._gate.take(predicted_works(request), param), text_size(request)

    def _check_ready(self) -> None:
        state, unavailable = self._client.state, self._client.unavailable
        if unavailable is not None:
            raise recovering(unavailable)
        if state not in (GroupState.READY, GroupState.RECOVERING):
            raise ApiError(
                f"The model instance is {state}.",
                status=503,
                kind="service_unavailable_error",
                code=f"model_{state}",
                retry_after=5,
            )


def _asked(computations: Sequence[Computation]) -> list[Work]:
    return [Work(prompt_tokens=len(each.tokens), max_tokens=0) for each in computations]
