"""What each actor of a model instance holds, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.plan_sizes import Numeric, expert_bytes, moe_layers, stage_bytes
from deploy.resolve import itemsize
from shards.cache_bytes import block_bytes, slot_bytes
from shards.spec import GroupSpec, Role

if TYPE_CHECKING:
    from models.interface import ModelConfig

INGRESS = "ingress"
_PROCESS_BYTES = 300 * 2**20
"""A Python process with torch and Ray: an idle actor was measured at 278 MB."""
_GPU_PROCESS_BYTES = 3 * 2**30
"""The same with CUDA's libraries and a context: an estimate."""
_WIDE = 4
"""Bytes of an element of an intermediate result: some are float32 whatever the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by what they are for; all but `process` are on the GPU where there is one."""

    weights: int = 0
    kv: int = 0
    state: int = 0
    activations: int = 0
    process: int = 0

    @property
    def caches(self) -> int:
        """Keys, values and recurrent states."""
        return self.kv + self.state

    @property
    def computing(self) -> int:
        """What lies where the computing is done."""
        return self.weights + self.caches + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorNeeds:
    """One actor before it has a place: `layers` half-open, `experts` those of every MoE layer."""

    role: str
    index: int
    memory: Memory
    layers: tuple[int, int] | None = None
    experts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """As in `/v1/experts`."""
        return f"{self.role}-{self.index}"


def actor_needs(config: ModelConfig, spec: GroupSpec, on_gpu: bool) -> tuple[ActorNeeds, ...]:
    """Every actor of an instance: ingress, engine, dispatcher, stages, experts.

    With the local executor the engine does all the computing.
    """
    process = _GPU_PROCESS_BYTES if on_gpu else _PROCESS_BYTES
    ingress = ActorNeeds(role=INGRESS, index=0, memory=Memory(process=_PROCESS_BYTES))
    if spec.executor == "local":
        return (ingress, _local_engine(config, spec, process))
    engine = ActorNeeds(role=Role.ENGINE, index=0, memory=Memory(process=_PROCESS_BYTES))
    dispatcher = (_dispatcher(config, spec),) if spec.placement is not None else ()
    stages = (_stage(config, spec, index, process) for index in range(len(spec.stage_layers)))
    return (ingress, engine, *dispatcher, *stages, *_experts(config, spec, process))


def numeric(spec: GroupSpec) -> Numeric:
    """How the weights of an instance are held."""
    return Numeric(itemsize=itemsize(spec.dtype), quantization=spec.quantization)


def _stage(config: ModelConfig, spec: GroupSpec, index: int, process: int) -> ActorNeeds:
    layers = spec.stage_layers[index]
    memory = Memory(
        weights=sum(stage_bytes(config, layers, numeric(spec))),
        kv=_kv_bytes(config, spec, layers),
        state=_state_bytes(config, spec, layers),
        activations=_stage_activations(config, spec, layers),
        process=process,
    )
    return ActorNeeds(role=Role.STAGE, index=index, memory=memory, layers=layers)


def _experts(config: ModelConfig, spec: GroupSpec, process: int) -> Iterator[ActorNeeds]:
    if spec.placement is None:
        return
    each = len(moe_layers(config)) * sum(expert_bytes(config, numeric(spec)))
    for index in range(spec.placement.num_shards):
        held = spec.placement.held_by(index)
        memory = Memory(
            weights=len(held) * each,
            activations=_expert_activations(config, spec, len(held)),
            process=process,
        )
        yield ActorNeeds(role=Role.EXPERT, index=index, memory=memory, experts=held)


def _dispatcher(config: ModelConfig, spec: GroupSpec) -> ActorNeeds:
    """Its rows are in host memory; with direct dispatch it holds none."""
    rows = 0 if spec.dispatch == "direct" else len(spec.stage_layers) * _exchange(config, spec)
    memory = Memory(activations=rows, process=_PROCESS_BYTES)
    return ActorNeeds(role=Role.DISPATCHER, index=0, memory=memory)


def _local_engine(config: ModelConfig, spec: GroupSpec, process: int) -> ActorNeeds:
    layers = (0, config.num_layers)
    experts = tuple(range(config.num_experts)) if moe_layers(config) else ()
    each = len(moe_layers(config)) * sum(expert_bytes(config, numeric(spec)))
    rows = _expert_activations(config, spec, len(experts))
    memory = Memory(
        weights=sum(stage_bytes(config, layers, numeric(spec))) + len(experts) * each,
        kv=_kv_bytes(config, spec, layers),
        state=_state_bytes(config, spec, layers),
        activations=_stage_activations(config, spec, layers) + rows,
        process=process,
    )
    return ActorNeeds(role=Role.ENGINE, index=0, memory=memory, layers=layers, experts=experts)


def _kv_bytes(config: ModelConfig, spec: GroupSpec, layers: tuple[int, int]) -> int:
    """Of as many sequences of max_model_len as may run at once."""
    limits = spec.limits
    one = block_bytes(config, range(*layers), limits.block_size, itemsize(spec.dtype))
    return limits.num_blocks * one


def _state_bytes(config: ModelConfig, spec: GroupSpec, layers: tuple[int, int]) -> int:
    """Of the running sequences; snapshots take what is left."""
    return spec.limits.num_state_slots * slot_bytes(config, range(*layers), itemsize(spec.dtype))


def _stage_activations(config: ModelConfig, spec: GroupSpec, layers: tuple[int, int]) -> int:
    """A step of max_num_batched_tokens: all intermediates of the widest layer at once, and logits.

    An upper bound: every matrix's output, beside residual, normed rows and what is exchanged.
    """
    tokens = spec.limits.max_num_batched_tokens
    widths = (
        sum(part.shape[0] for part in config.layer_tensors(i).values() if len(part.shape) > 1)
        for i in range(*layers)
    )
    total = tokens * (2 * config.hidden_size + max(widths)) * _WIDE
    if spec.dispatch == "direct" and spec.placement is not None:
        total += _exchange(config, spec)
    if layers[1] == config.num_layers:
        total += 2 * spec.limits.num_seats * config.vocab_size * _WIDE
    return total


def _expert_activations(config: ModelConfig, spec: GroupSpec, num_held: int) -> int:
    """The rows of a whole step, should all of them come here: in, gate, up, their product, out."""
    if not num_held:
        return 0
    layer = moe_layers(config)[0]
    width, hidden = config.expert_tensors(layer, 0)["gate"].shape
    rows = spec.limits.max_num_batched_tokens * min(config.top_k, num_held)
    return rows * (2 * hidden + 3 * width) * _WIDE


def _exchange(config: ModelConfig, spec: GroupSpec) -> int:
    """Rows of a step to experts and back, and the combined ones."""
    tokens = spec.limits.max_num_batched_tokens
    return tokens * (2 * config.top_k + 2) * config.hidden_size * itemsize(spec.dtype)
