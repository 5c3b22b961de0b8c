"""From options to a model instance's frozen description: reads config.json and headers only."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.backends import backend_warnings, kernel_choice
from deploy.bundles import spread_over
from deploy.config import ConfigError, ServeArgs
from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.exchange_bound import check_exchange, few_tokens
from deploy.http_options import HttpOptions
from deploy.model_facts import ModelFacts, model_facts
from deploy.scaling_policy import ScalingTargets
from deploy.stage_split import num_stages, split_layers
from deploy.trace_options import TraceOptions
from models.quantization_config import effective_quantization
from router.limits import EngineLimits
from router.placement import Placement, place_experts
from shards.cache_budget import (
    contents,
    fit_caches,
    least_bytes,
    most_caches,
    size_text,
    total_cost,
)
from shards.cache_bytes import block_bytes, slot_bytes
from shards.spec import CacheCost, GroupSpec

if TYPE_CHECKING:
    from deploy.served_model import ServedModel
    from models.interface import ModelConfig

_DEFAULT_MAX_MODEL_LEN = 8192
IdRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedArgs:
    """Everything the ingress needs to know, with no default left open and no torch behind it."""

    served_model_name: str
    model_path: str
    family: str
    vocab_size: int
    num_layers: int
    num_experts: int
    facts: ModelFacts
    spec: GroupSpec
    api_keys: tuple[str, ...]
    min_replicas: int
    max_replicas: int
    scaling: ScalingTargets
    drain_s: float
    """How long a replica that is taken away may go on with the requests it has."""
    cpus_per_actor: float
    log_level: str
    http: HttpOptions
    max_queue_s: float
    strict_requests: bool
    tool_call_parser: str
    reasoning_parser: str
    log_format: str
    keep_alive_s: float
    """After so long without a chunk a stream says that it lives."""
    threads: int | None
    """As asked for; None: the replica decides by its cores and actors."""
    chat_template: str | None = None
    """The text that takes the place of the checkpoint's templates."""
    trust_request_chat_template: bool = False
    traces: TraceOptions | None = None
    warnings: tuple[str, ...] = ()
    """What is unusual about the checkpoint or about how it is computed."""


def model_folder(model: str) -> Path:
    """The checkpoint folder that MODEL names. Raises ConfigError."""
    try:
        return _model_folder(model)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"model={model}: cannot be read: {reason}") from None


def _model_folder(model: str) -> Path:
    folder = nano_checkpoint(model) if model in NANO_MODELS else Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"model={model}: no such folder; allowed values are a checkpoint folder, "
            f"{', '.join(NANO_MODELS)}"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={model}: the folder has no config.json")
    return folder.resolve()


def resolve(args: ServeArgs) -> ResolvedArgs:
    """Choose every default and refuse what cannot be served. Raises ConfigError."""
    folder = model_folder(args.model)
    name = args.served_model_name
    if name is None:
        name = args.model if args.model in NANO_MODELS else folder.name
    # The models import torch, which takes seconds: the cheap checks come first.
    from deploy.chat_files import given_template
    from deploy.served_model import load_served_model
    from shards.checkpoint import open_model
    from shards.verify import verify

    try:
        kernels = kernel_choice(args.kernels, args.attention_backend, args.mamba_backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        chat_template = given_template(args.chat_template)
    except (ValueError, OSError) as error:
        raise ConfigError(f"chat_template={args.chat_template}: {_one_sentence(error)}") from error
    try:
        config, checkpoint = open_model(folder)
        verify(config, checkpoint)
        # Read here to fail now; the ingress reads tokenizer and template again.
        served = load_served_model(
            name,
            str(folder),
            config.vocab_size,
            config.max_position_embeddings,
            tool_call_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
        )
        tool_call_parser = served.tool_call_parser
    except (ValueError, OSError) as error:
        raise ConfigError(f"model={args.model}: {_one_sentence(error)}") from error
    return ResolvedArgs(
        served_model_name=name,
        model_path=str(folder),
        family=config.family,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        facts=model_facts(config),
        spec=replace(
            spread_over(group_spec(args, folder, config), args.nodes),
            unused_token_ids=_unused_token_ids(served),
            kernels=kernels,
        ),
        api_keys=args.api_key,
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas or max(1, args.min_replicas),
        scaling=ScalingTargets(ttft_s=args.ttft_target, scale_down_delay_s=args.scale_down_delay),
        drain_s=args.drain_timeout,
        cpus_per_actor=args.cpus_per_actor,
        log_level=args.log_level,
        http=args.http,
        max_queue_s=args.max_queue_seconds,
        strict_requests=args.strict_requests,
        tool_call_parser=tool_call_parser,
        reasoning_parser=served.reasoning_parser,
        log_format=args.log_format,
        keep_alive_s=args.sse_keep_alive_seconds,
        threads=args.threads,
        chat_template=chat_template,
        trust_request_chat_template=args.trust_request_chat_template,
        traces=args.traces,
        warnings=(*config.notes, *backend_warnings(config)),
    )


def _unused_token_ids(served: ServedModel) -> IdRanges:
    """Rows of the vocabulary without a token; without a tokenizer every id is somebody's."""
    if served.tokenizer is None:
        return ()
    return served.tokenizer.unused_ranges(served.vocab_size)


def group_spec(args: ServeArgs, folder: Path, config: ModelConfig) -> GroupSpec:
    """Actors, layers, experts and caches of one model instance, by its configuration alone.

    Raises ConfigError.
    """
    executor = _executor(args)
    local = executor == "local"
    dtype = config.dtype_name if args.dtype == "auto" else args.dtype
    quantization = _quantization(args, config)
    stage_layers = split_layers(args, config, itemsize(dtype), quantization)
    costs = _cache_costs(args, config, dtype, stage_layers)
    placement = None if local else _placement(args, config)
    if placement is not None:
        check_exchange(args.max_num_batched_tokens, config, itemsize(dtype))
    return GroupSpec(
        model_path=str(folder),
        dtype=dtype,
        executor=executor,
        dispatch=args.dispatch,
        stage_layers=stage_layers,
        placement=placement,
        limits=_limits(args, config, costs, placement, lookahead=not local),
        cache_costs=costs if args.kv_cache_memory is None else (),
        threads=args.threads or 1,
        secret=secrets.token_hex(16),
        deadlines=args.deadlines,
        quantization=quantization,
        # One process that does everything is rarely started again; a spare would be its equal.
        warm_spare=not local if args.warm_spare is None else args.warm_spare,
    )


def _quantization(args: ServeArgs, config: ModelConfig) -> str:
    try:
        return effective_quantization(args.quantization, config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _executor(args: ServeArgs) -> str:
    """Local unless more than one actor was asked for."""
    stages = num_stages(args)
    spread = stages > 1 or (args.expert_shards or 1) > 1
    if args.executor == "auto":
        return "pipeline" if spread or args.expert_replicas > 1 else "local"
    if args.executor == "local":
        for key, value in (
            ("stages" if args.stages else "number of ranges in stage_layers", stages),
            ("expert_shards", args.expert_shards or 1),
            ("expert_replicas", args.expert_replicas),
        ):
            if value > 1:
                raise ConfigError(f"{key}={value}: allowed values are 1 with executor=local")
    return args.executor


def _placement(args: ServeArgs, config: ModelConfig) -> Placement | None:
    if not any(config.is_moe_layer(layer) for layer in range(config.num_layers)):
        if args.expert_shards:
            raise ConfigError(
                f"expert_shards={args.expert_shards}: allowed values are 0, "
                "because no layer of this model has routed experts"
            )
        return None
    shards = 1 if args.expert_shards is None else args.expert_shards
    most = config.num_experts * args.expert_replicas
    if not 1 <= shards <= most:
        raise ConfigError(f"expert_shards={shards}: allowed values are 1..{most}")
    try:
        return place_experts(config.num_experts, shards, args.expert_replicas)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _cache_costs(
    args: ServeArgs, config: ModelConfig, dtype: str, stage_layers: IdRanges
) -> tuple[CacheCost, ...]:
    """What the layers of each stage remember."""
    size = itemsize(dtype)
    return tuple(
        CacheCost(
            block_bytes=block_bytes(config, range(first, last), args.block_size, size),
            state_bytes=slot_bytes(config, range(first, last), size),
        )
        for first, last in stage_layers
    )


def _limits(
    args: ServeArgs,
    config: ModelConfig,
    costs: tuple[CacheCost, ...],
    placement: Placement | None,
    *,
    lookahead: bool,
) -> EngineLimits:
    """With kv_cache_memory whole; without it the caches are the largest that could be of use."""
    longest = config.max_position_embeddings
    max_model_len = args.max_model_len or min(longest, _DEFAULT_MAX_MODEL_LEN)
    if max_model_len > longest:
        raise ConfigError(f"max_model_len={max_model_len}: allowed values are 1..{longest}")
    total = total_cost(costs)
    try:
        most = most_caches(
            EngineLimits(
                block_size=args.block_size,
                num_blocks=1,
                num_state_slots=args.max_num_seqs if total.state_bytes else 0,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                max_model_len=max_model_len,
                reprefill_length=config.reprefill_length,
                max_in_flight=len(costs),
                # In one process planning and computing take turns.
                lookahead=lookahead and len(costs) == 1,
                prefix_caching=args.enable_prefix_caching,
                window=config.sliding_window,
                few_tokens=None if placement is None else few_tokens(config),
            )
        )
    except ValueError as error:
        raise ConfigError(_one_sentence(error)) from error
    budget, least = args.kv_cache_memory, least_bytes(most, total)
    if budget is None:
        return most
    if budget < least:
        raise ConfigError(
            f"kv_cache_memory={budget}: allowed values are {least} ({size_text(least)}) or more, "
            f"the size of {contents(most)}"
        )
    return fit_caches(most, [(total, budget)])


def itemsize(dtype: str) -> int:
    """Bytes of one element of a model dtype."""
    return 4 if dtype == "float32" else 2


def _one_sentence(error: Exception) -> str:
    return " ".join(str(error).split())
