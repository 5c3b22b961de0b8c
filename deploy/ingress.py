"""The Serve deployment: one replica is one model instance with its own placement group."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import TaskCancelledError

from deploy.agent_metrics import report_to_agent
from deploy.cpu_features import instruction_set
from deploy.handle_calls import HandleCalls
from deploy.http_api import build_api
from deploy.live_settings import LiveSettings, initial_user_config
from deploy.load_report import LoadReporter
from deploy.openai_errors import Json
from deploy.printable import printable
from deploy.replica_start import ReplicaClock
from deploy.resolve import ResolvedArgs
from deploy.served_model import load_served_model
from deploy.service import ApiService
from deploy.user_config import changed_model, parse_user_config
from deploy.version import VERSION
from deploy.vocabulary import vocabulary_of
from deploy.warm_up import warm_up_of
from models.kernels.choice import backends, resolve_kernels
from shards.client import GroupState
from shards.cores import available_cores, default_threads
from shards.group import ModelGroup
from shards.logs import log_to_stderr
from shards.spec import GroupSpec

if TYPE_CHECKING:
    from deploy.tracing import Tracing

log = logging.getLogger("conclave.ingress")

_BEFORE_S = 5.0
"""A replica's process and its imports, before its constructor runs."""


def make_group(resolved: ResolvedArgs, prefix: str) -> ModelGroup:
    """Build and start the model instance inside this replica's placement group; blocks.

    Raises GroupFailed when it cannot be started.
    """
    from ray.util import get_current_placement_group

    from router.transport.sockets import SocketTransport
    from shards.control import INGRESS
    from shards.ray_launcher import RayLauncher

    spec: GroupSpec = resolved.spec
    launcher = RayLauncher(prefix, get_current_placement_group(), resolved.cpus_per_actor)
    group = ModelGroup(spec, launcher, SocketTransport(INGRESS, spec.secret))
    group.start()
    return group


def settle(resolved: ResolvedArgs) -> GroupSpec:
    """The spec with what only the replica's place decides: kernels, and threads by its cores."""
    from ray.util import get_current_placement_group

    from shards.ray_launcher import compute_actors_together

    spec: GroupSpec = replace(resolved.spec, kernels=resolve_kernels(resolved.spec.kernels))
    cores = available_cores()
    actors = compute_actors_together(spec, get_current_placement_group())
    threads = resolved.threads or default_threads(spec.kernels, cores, actors)
    return replace(spec, threads=threads, crowded=threads > 1 and threads * actors > cores)


def start_tracing(resolved: ResolvedArgs, replica_id: str) -> Tracing | None:
    """Traces of this replica; OpenTelemetry is imported only where there is a collector."""
    if resolved.traces is None:
        return None
    from deploy.tracing import Tracing

    return Tracing(resolved.traces, model=resolved.served_model_name, replica_id=replica_id)


def build_facts(resolved: ResolvedArgs) -> Json:
    """What decides the bits of an answer, for /version."""
    return {
        "version": VERSION,
        "build": f"conclave-{VERSION}",
        "isa": instruction_set(),
        "dtype": resolved.spec.dtype,
        "heads": sorted(resolved.facts.heads),
        "quantization": resolved.spec.quantization,
        "tool_call_parser": resolved.tool_call_parser,
        "reasoning_parser": resolved.reasoning_parser,
        "threads": resolved.spec.threads,
        "kernels": resolved.spec.kernels,
        "kernel_backends": backends(resolved.spec.kernels),
    }


@serve.ingress()
class Ingress:
    """OpenAI API over HTTP, and the same as plain dicts over Python handles."""

    # Serve awaits constructors that are coroutines.
    async def __init__(self, resolved: ResolvedArgs) -> None:  # type: ignore[misc]
        clock = ReplicaClock()
        began = time.monotonic()
        level = logging.getLevelNamesMapping()[resolved.log_level.upper()]
        log_to_stderr(level, resolved.log_format)
        self._api_keys, self._http = resolved.api_keys, resolved.http
        # Chosen here, where the weights will be, and not wherever the command was typed.
        with clock.part("kernels"):
            spec = await asyncio.to_thread(settle, resolved)
        with clock.part("tokenizer"):
            model = load_served_model(
                resolved.served_model_name,
                resolved.model_path,
                resolved.vocab_size,
                spec.limits.max_model_len,
                tool_call_parser=resolved.tool_call_parser,
                reasoning_parser=resolved.reasoning_parser,
                chat_template=resolved.chat_template,
                trust_request_chat_template=resolved.trust_request_chat_template,
            )
        context = serve.get_replica_context()
        user_config = initial_user_config(context)
        if user_config is not None:  # a bad one fails here, before weights are read
            changed_model(parse_user_config(user_config), model)
        # 100 000 tokens take a few tenths of a second.
        with clock.part("tokenizer"):
            vocabulary = await asyncio.to_thread(vocabulary_of, model)
        spec = replace(spec, vocabulary=vocabulary, warm_up=warm_up_of(resolved))
        resolved = replace(resolved, spec=spec)
        for warning in (*resolved.warnings, *model.warnings):
            log.warning("%s: %s", printable(model.name), printable(warning))
        prefix = f"conclave/{context.app_name}/{context.replica_tag}"
        tracing = start_tracing(resolved, context.replica_tag)
        # Off the loop: health checks are answered while the weights load.
        self._group = await asyncio.to_thread(make_group, resolved, prefix)
        self._service = ApiService(
            self._group,
            model,
            resolved.facts,
            max_num_seqs=spec.limits.num_seats,
            max_num_batched_tokens=spec.limits.max_num_batched_tokens,
            replica_id=context.replica_tag,
            build=build_facts(resolved),
            strict=resolved.strict_requests,
            block_size=spec.limits.block_size,
            max_queue_s=resolved.max_queue_s,
            keep_alive_s=resolved.keep_alive_s,
            tracing=tracing,
        )
        self._calls = HandleCalls(self._service)
        self._settings = LiveSettings(self._service)
        if user_config is not None:
            await self._settings.change(user_config)
        self._reporter = report_to_agent(
            self._service.metrics.registry, {"application": context.app_name}
        )
        now = time.monotonic()
        self._load_reporter = LoadReporter(
            self._service.admission, startup_s=_BEFORE_S + now - began, now=now
        )
        self._start = clock.start(context.replica_tag, self._group.start_record)

    async def reconfigure(self, user_config: object) -> None:
        """Serve's `user_config` has changed, and nothing else: sampling, limits, chat template."""
        await self._settings.change(user_config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(
            self._service,
            self._api_keys,
            self._http,
            behind_serve=True,
            lost_client=(TaskCancelledError,),
        )

    async def chat(self, body: Json) -> Any:
        """A chat completion; with `stream` an async generator of chunks."""
        return await self._calls.generate("chat", body)

    async def completions(self, body: Json) -> Any:
        """A completion; with `stream` an async generator of chunks."""
        return await self._calls.generate("completions", body)

    async def classify(self, body: Json) -> Any:
        """What /v1/classify answers."""
        return await self._calls.answer("classify", body)

    async def tokenize(self, body: Json) -> Any:
        """What /tokenize answers."""
        return await self._calls.answer("tokenize", body)

    async def detokenize(self, body: Json) -> Any:
        """What /detokenize answers."""
        return await self._calls.answer("detokenize", body)

    async def forward(self, body: Json) -> Any:
        """One forward over a batch of token ids: numpy arrays as Transformers names them."""
        return await self._calls.answer("forward", body)

    async def models(self) -> Json:
        """What /v1/models shows."""
        return self._service.models()

    async def experts(self) -> Json:
        """What /v1/experts shows."""
        return self._service.experts()

    async def startup(self) -> Json:
        """What the start of the replica that is asked took, in seconds."""
        return asdict(self._start)

    async def metrics(self) -> str:
        """What /metrics shows of the replica that is asked."""
        return (await asyncio.to_thread(self._service.metrics.text)).decode()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes on to the autoscaling policy, every few seconds."""
        return asdict(self._load_reporter.report(time.monotonic(), self._group.load))

    def check_health(self) -> None:
        """Fails only when the supervisor has given up; healing is not ill health."""
        if self._group.state is GroupState.FAILED:
            raise RuntimeError("the model instance has failed for good")

    async def __del__(self) -> None:
        reporter = getattr(self, "_reporter", None)
        if reporter is not None:
            await asyncio.to_thread(reporter.stop)
        group = getattr(self, "_group", None)
        if group is not None:
            await asyncio.to_thread(group.stop)
        service = getattr(self, "_service", None)
        if service is not None and service.tracing is not None:
            await asyncio.to_thread(service.tracing.close)
