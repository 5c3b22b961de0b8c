"""The API without a web server: dicts in, dicts (or streams of dicts) out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from deploy.admission import Admission, AdmissionLimits, Work
from deploy.answer import SEQUENCE_ERRORS, Answer, api_error, works
from deploy.answer_grammar import answer_grammar, asks_grammar, grammar_warnings
from deploy.classify import classify_body, classify_inputs, pooled_position
from deploy.compute import Arrays, Computation, StepBudget, compute
from deploy.dispatch_costs import dispatch_costs
from deploy.field_warnings import field_warnings
from deploy.forward import Outputs, plan_forward
from deploy.gate import Gate
from deploy.generation import plan_choices
from deploy.metrics import AnswerMeter, Metrics
from deploy.model_facts import ModelFacts
from deploy.openai_errors import ApiError, Json, not_finite, recovering
from deploy.openai_replies import ReplyContext
from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest, parse_request
from deploy.patient_stream import PatientStream
from deploy.predicted_work import num_sequences, predicted_works
from deploy.prompts import Echo, Prompt, chat_prompt, text_prompts
from deploy.request_record import RequestRecord, current_record
from deploy.served_model import ServedModel
from deploy.text_threads import TextThreads
from deploy.tokenization import detokenize_body, tokenize_body
from deploy.tokenize_schema import DetokenizeRequest, TokenizeRequest
from router.step import Want
from shards.client import GroupState, ModelClient
from shards.cores import available_cores

_WAITING_PER_RUNNING = 16


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
        self._text = TextThreads.for_cores(available_cores())
        # Apart from the others: they wait for each other's turn to be compiled.
        self._grammars = TextThreads(2)
        self._replica_id = replica_id
        self._build = dict(build or {})
        self.strict = strict
        self.keep_alive_s = keep_alive_s
        """After so long without a chunk a stream says that it lives."""
        self.metrics = Metrics(client, replica_id)

    @property
    def admission(self) -> Admission:
        """Who is under way, and how fast this replica has been."""
        return self._admission

    @property
    def state(self) -> GroupState:
        """The model instance's state."""
        return self._client.state

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
        self._check_predicted(request, "n")
        prompt = await self._text.run(chat_prompt, self._model, request)
        return await self._answer(request, [prompt])

    async def completions(self, body: object) -> Json | PatientStream:
        """/v1/completions: the response, or its chunks with `stream`. Raises ApiError."""
        request = parse_request(CompletionRequest, body, strict=self.strict)
        self._check_model(request.model)
        self._facts.need_lm_head()
        self._check_predicted(request, "n" if len(request.prompts) == 1 else "prompt")
        prompts = await self._text.run(text_prompts, self._model, request, "prompt")
        return await self._answer(request, prompts)

    async def classify(self, body: object) -> Json:
        """/v1/classify: what the classification head says of each input. Raises ApiError."""
        request = parse_request(ClassifyRequest, body, strict=self.strict)
        self._check_model(request.model)
        label_set = self._facts.need_labels()
        param = "input" if request.messages is None else "messages"
        self._check_predicted(request, param)
        inputs = await self._text.run(classify_inputs, self._model, request, param)
        computations = [
            Computation(
                tokens=tokens,
                want=Want(score_position=pooled_position(tokens, label_set.pad_token_id)),
                priority=request.priority,
            )
            for tokens in inputs
        ]
        rows = await self._compute(computations, param)
        scores = [row["score"][0].astype(np.float32) for row in rows]
        if not all(np.isfinite(row).all() for row in scores):
            raise not_finite()
        return classify_body(self._model, request, label_set, inputs, scores)

    async def tokenize(self, body: object) -> Json:
        """/tokenize: the tokens of a prompt or a chat. Raises ApiError."""
        request = parse_request(TokenizeRequest, body, strict=self.strict)
        self._check_model(request.model)
        return await self._text.run(tokenize_body, self._model, request)

    async def detokenize(self, body: object) -> Json:
        """/detokenize: the text of tokens. Raises ApiError."""
        request = parse_request(DetokenizeRequest, body, strict=self.strict)
        self._check_model(request.model)
        return await self._text.run(detokenize_body, self._model, request)

    async def forward(self, body: object) -> Outputs:
        """One forward over a batch, as Transformers defines its outputs. Raises ApiError."""
        batch = await asyncio.to_thread(
            plan_forward, body, self._facts, self._model.max_model_len, self._max_batched_tokens
        )
        rows = await self._compute(batch.computations(), "input_ids")
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

    async def _answer(
        self, request: ChatRequest | CompletionRequest, prompts: list[Prompt]
    ) -> Json | PatientStream:
        token_ids = [prompt.token_ids for prompt in prompts]
        echoes = self._echoes(request, prompts)
        reading = prompts[0].reading
        grammar = None
        if asks_grammar(request, reading):
            grammar = await self._grammars.run(answer_grammar, self._model, request, reading)
        plans = plan_choices(self._model, request, token_ids, echoes, grammar, reading)
        self._check_room(works(plans), "n")
        record = current_record()
        meter = AnswerMeter(self.metrics, record)
        context = self._context(request, record)
        answer = Answer(self._client, self._gate, context, plans, token_ids, meter)
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

    async def _compute(self, computations: Sequence[Computation], param: str) -> list[Arrays]:
        """Run sequences of the request's field `param`. Raises ApiError."""
        asked = [Work(prompt_tokens=len(each.tokens), max_tokens=0) for each in computations]
        self._check_room(asked, param)
        meter = AnswerMeter(self.metrics, current_record())
        with self._gate.hold(asked) as held:
            meter.start([each.tokens for each in computations])
            try:
                rows = await compute(self._client, self._budget, computations, meter.waited)
                for index in range(len(rows)):
                    held.saw_token(index)
                return rows
            except SEQUENCE_ERRORS as error:
                raise api_error(error) from error

    def check_room(self) -> None:
        """Raises ApiError where no request at all would be admitted: 503 or 429."""
        self._check_ready()
        self._gate.check_room()

    def _check_predicted(
        self, request: ChatRequest | CompletionRequest | ClassifyRequest, param: str
    ) -> None:
        # Their number first: a list of all of them may be too long to make.
        self._gate.admission.check_number(num_sequences(request), param)
        self._check_room(predicted_works(request), param)

    def _check_room(self, asked: Sequence[Work], param: str) -> None:
        """Once before anything is tokenized, and again when its length is known."""
        self._check_ready()
        self._gate.check(asked, param)

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

    def _context(
        self, request: ChatRequest | CompletionRequest, record: RequestRecord
    ) -> ReplyContext:
        chat = isinstance(request, ChatRequest)
        options = request.stream_options
        return ReplyContext(
            request_id=f"{'chatcmpl' if chat else 'cmpl'}-{record.request_id}",
            model=self._model.name,
            created=int(time.time()),
            tokenizer=self._model.tokenizer,
            chat=chat,
            num_logprobs=(
                request.wanted_logprobs if isinstance(request, ChatRequest) else request.logprobs
            ),
            num_prompt_logprobs=request.prompt_logprobs,
            tokens_as_ids=bool(request.return_tokens_as_token_ids),
            token_ids=bool(request.return_token_ids),
            include_usage=options is not None and options.include_usage,
            continuous_usage=options is not None and options.continuous_usage_stats,
            warnings=(
                *field_warnings(self._model, request),
                *grammar_warnings(self._model, request),
            ),
        )
