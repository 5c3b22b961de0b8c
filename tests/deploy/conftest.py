"""An in-memory ModelClient that says what a test tells it to, and the API around it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from deploy.demo import nano_checkpoint
from deploy.http_api import build_api
from deploy.served_model import ServedModel, load_served_model
from deploy.service import ApiService
from router.step import EngineLoad, FinishReason, SamplingParams, Token
from shards.client import GroupState, WorkerStatus

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

    async def __aiter__(self) -> AsyncIterator[Token]:
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
    load: EngineLoad = field(default_factory=EngineLoad)
    routing_table_version: int = 3
    streams: list[ScriptedStream] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def generate(
        self, prompt: tuple[int, ...], sampling: SamplingParams, *, priority: int = 0
    ) -> ScriptedStream:
        ids = self.script(prompt, sampling)
        stream = ScriptedStream(next(self._ids), ids, sampling, self.delay, self.error)
        self.streams.append(stream)
        self.prompts.append(prompt)
        return stream

    def workers(self) -> tuple[WorkerStatus, ...]:
        return (
            WorkerStatus(
                role="expert", index=1, pid=42, node_id="n", state="ready", experts=(1, 3)
            ),
        )

    def stop(self) -> None:
        self.state = GroupState.STOPPED


def load_nano(name: str) -> ServedModel:
    return load_served_model(name, str(nano_checkpoint(name)), 512, MAX_MODEL_LEN)


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

    def app(self, api_keys: tuple[str, ...] = ()) -> object:
        return build_api(self.service, api_keys)


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
    ) -> Api:
        served = model or nano_jamba
        script = say(nano_jamba, text) if ids is None else ids
        client = ScriptedClient(lambda prompt, sampling: script, delay, error)
        service = ApiService(client, served, max_num_seqs=max_num_seqs, replica_id="r1")
        return Api(served, client, service)

    return make
