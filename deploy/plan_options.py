"""The options of `conclave plan`, and the machines that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deploy.config import ConfigError, ServeArgs, parse_args, parse_bytes

GPU_USABLE = 0.9
"""Of a GPU's memory. The rest is for its context, for libraries and for what fragments."""
# Those of an H100 SXM5 in its data sheet; a CPU node's are an order of magnitude, no more.
_GPU_BANDWIDTH, _GPU_FLOPS = 3_350 * 10**9, 989 * 10**12
_CPU_BANDWIDTH, _CPU_FLOPS = 100 * 10**9, 2 * 10**12

Size = Annotated[int, Field(ge=1), BeforeValidator(parse_bytes)]
Count = Annotated[int, Field(ge=1, le=4096)]


class PlanArgs(BaseModel):
    """What the user asked for; None means that the plan chooses."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[str, Field(min_length=1)]
    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 8
    gpu_memory: Size = 80 * 2**30
    node_memory: Size | None = None
    memory_bandwidth: Size | None = None
    tflops: Annotated[float, Field(gt=0, le=1e6)] | None = None
    context: Annotated[int, Field(ge=2)] | None = None
    concurrency: Count = 32
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    dtype: str = "auto"
    quantization: str = "none"
    stages: Count | None = None
    stage_layers: str | None = None
    expert_shards: Annotated[int, Field(ge=0, le=4096)] | None = None
    expert_replicas: Count = 1
    dispatch: str = "actor"
    layout: Literal["auto", "colocated", "disaggregated"] = "auto"

    def serve_args(self, stages: int | None, expert_shards: int | None) -> ServeArgs:
        """The options of `conclave serve` with this many actors. Raises ConfigError."""
        same = ("dtype", "quantization", "stage_layers", "expert_replicas", "dispatch", "model")
        return parse_args(
            {
                **{key: getattr(self, key) for key in (*same, "max_num_batched_tokens")},
                "stages": stages,
                "expert_shards": expert_shards,
                "max_model_len": self.context,
                "max_num_seqs": self.concurrency,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Equal nodes; bandwidth in bytes/s and flops in FLOP/s are a GPU's, or a CPU node's."""

    nodes: int
    gpus_per_node: int
    gpu_memory: int
    node_memory: int | None
    """None: as much as it takes."""
    memory_bandwidth: int
    flops: float

    @property
    def num_gpus(self) -> int:
        """All nodes' GPUs; 0 is a plan for CPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_gpu_memory(self) -> int:
        """Bytes of a GPU that actors may fill."""
        return int(self.gpu_memory * GPU_USABLE)


def hardware(args: PlanArgs) -> Hardware:
    """The machines that the options describe."""
    on_gpu = args.gpus_per_node > 0
    flops = args.tflops * 10**12 if args.tflops else (_GPU_FLOPS if on_gpu else _CPU_FLOPS)
    return Hardware(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu_memory=args.gpu_memory if on_gpu else 0,
        node_memory=args.node_memory,
        memory_bandwidth=args.memory_bandwidth or (_GPU_BANDWIDTH if on_gpu else _CPU_BANDWIDTH),
        flops=flops,
    )


def layout(args: PlanArgs) -> str:
    """`auto`: stages and experts share GPUs; on CPUs each has a process of its own."""
    if args.gpus_per_node == 0 and args.layout == "colocated":
        raise ConfigError(
            "layout=colocated: allowed values are auto, disaggregated with gpus_per_node=0"
        )
    if args.layout != "auto":
        return args.layout
    return "colocated" if args.gpus_per_node else "disaggregated"
