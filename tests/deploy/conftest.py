"""An in-memory ModelClient that says what a test tells it to, and the API around it."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from deploy.compute import Arrays
from deploy.config import parse_args
from deploy.demo import nano_checkpoint
from deploy.http_api import build_api
from deploy.http_options import HttpOptions
from deploy.model_facts import ModelFacts
from deploy.resolve import resolve
from deploy.served_model import ServedModel, load_served_model
from deploy.service import ApiService
from router.layer_totals import LayerTotals
from router.step import NO_TOKEN, NOTHING, EngineLoad, FinishReason, SamplingParams, Token, Want
from shards.client import GroupState, GroupUnavailable, Trouble, WorkerStatus
from shards.sequence_trace import SequenceTrace
from tests.groups import running_group

if TYPE_CHECKING:
    from deploy.tracing import Tracing

MAX_MODEL_LEN = 256
Script = Callable[[tuple[int, ...], SamplingParams], list[int]]


@dataclass
class ScriptedStream:
    """Emits the script's ids by the engine's rules for ends; counts how far it got."""

    seq_id: int
    ids: list[int]
    sampling: SamplingParams
    delay: float
    error: Exception | None
    aborted: bool = False
    emitted: int = 0
    outputs: Arrays = field(default_factory=dict)
    queue_seconds: float | None = 0.25

    async def __aiter__(self) -> AsyncIterator[Token]:
        if self.sampling.max_tokens == 0:
            await asyncio.sleep(self.delay)
            yield Token(
                seq_id=self.seq_id, position=0, token_id=NO_TOKEN, finish=FinishReason.LENGTH
            )
            return
        for position, token_id in enumerate(self.ids):
            await asyncio.sleep(self.delay)
            if self.aborted:
                return
            finish = None
            if token_id in self.sampling.stop_token_ids:
                finish = FinishReason.STOP
            elif position + 1 == self.sampling.max_tokens:
                finish = FinishReason.LENGTH
            self.emitted += 1
            top = tuple((token_id + i, -0.5 - i) for i in range(self.sampling.logprobs or 0))
            yield Token(
                seq_id=self.seq_id,
                position=position,
                token_id=token_id,
                logprob=-0.5 if self.sampling.logprobs is not None else None,
                top_logprobs=top,
                finish=finish,
            )
            if finish is not None:
                return
        if self.error is not None:
            raise self.error
        raise AssertionError("the script ended before the sequence did")

    def abort(self) -> None:
        self.aborted = True


@dataclass
class ScriptedClient:
    """Implements ModelClient; `script` maps prompt and sampling to token ids."""

    script: Script
    delay: float = 0.0
    error: Exception | None = None
    state: GroupState = GroupState.READY
    failure: str = ""
    trouble: Trouble | None = None
    unavailable: GroupUnavailable | None = None
    load: EngineLoad = field(default_factory=EngineLoad)
    routing_table_version: int = 3
    cache_summary: str = "the KV cache holds 64 tokens"
    layer_totals: dict[int, LayerTotals] = field(default_factory=dict)
    streams: list[ScriptedStream] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    grammars: list[str | None] = field(default_factory=list)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        want: Want = NOTHING,
        grammar: str | None = None,
        cache_salt: str = "",
        trace: SequenceTrace | None = None,
    ) -> ScriptedStream:
        ids = self.script(prompt, sampling)
        stream = ScriptedStream(next(self._ids), ids, sampling, self.delay, self.error)
        self.streams.append(stream)
        self.prompts.append(prompt)
        self.grammars.append(grammar)
        return stream

    def workers(self) -> tuple[WorkerStatus, ...]:
        return (
            WorkerStatus(
                role="expert",
                index=1,
                pid=42,
                node_id="n",
                state="alive",
                deaths=2,
                recoveries=1,
                experts=(1, 3),
            ),
        )

    def stop(self) -> None:
        self.state = GroupState.STOPPED


def load_nano(name: str) -> ServedModel:
    return load_served_model(name, str(nano_checkpoint(name)), 512, MAX_MODEL_LEN)


@functools.cache
def facts_of(model: str) -> ModelFacts:
    return resolve(parse_args({"model": model})).facts


@contextmanager
def running_service(
    folder: Path, *, tracing: Tracing | None = None, **options: Any
) -> Iterator[ApiService]:
    """The API over real workers, which are threads of this process."""
    with running_group(folder, **options) as group:
        limits = group.spec.limits
        facts = facts_of(str(folder))
        served = load_served_model("tiny", str(folder), facts.vocab_size, limits.max_model_len)
        yield ApiService(
            group,
            served,
            facts,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            tracing=tracing,
        )


@pytest.fixture
def nano_jamba() -> ServedModel:
    return load_nano("nano-jamba")


def say(model: ServedModel, text: str, *, end: bool = True) -> list[int]:
    """Token ids of an answer, ended by the model's end-of-turn token."""
    assert model.tokenizer is not None
    ids = list(model.tokenizer.encode(text, add_special_tokens=False))
    return [*ids, model.defaults.eos_token_ids[-1]] if end else ids


@dataclass
class Api:
    """One model behind the whole HTTP application, with the client that scripts its tokens."""

    model: ServedModel
    client: ScriptedClient
    service: ApiService

    def app(self, api_keys: tuple[str, ...] = (), *, options: HttpOptions | None = None) -> FastAPI:
        return build_api(self.service, api_keys, options)


@pytest.fixture
def make_api(nano_jamba: ServedModel) -> Callable[..., Api]:
    def make(
        text: str = "Hello there",
        *,
        ids: list[int] | None = None,
        model: ServedModel | None = None,
        max_num_seqs: int = 4,
        delay: float = 0.0,
        error: Exception | None = None,
        strict: bool = False,
    ) -> Api:
        served = model or nano_jamba
        script = say(nano_jamba, text) if ids is None else ids
        client = ScriptedClient(lambda prompt, sampling: script, delay, error)
        service = ApiService(
            client,
            served,
            facts_of("nano-jamba"),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=512,
            replica_id="r1",
            strict=strict,
        )
        return Api(served, client, service)

    return make
