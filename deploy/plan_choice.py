"""Which topology a plan takes, and the nearest machines that have room where these have not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.config import ConfigError
from deploy.plan_bounds import decode_bound
from deploy.plan_options import Hardware, PlanArgs, hardware, layout
from deploy.plan_sizes import moe_layers
from deploy.plan_topology import Topology, place
from deploy.resolve import group_spec
from deploy.stage_split import num_stages

if TYPE_CHECKING:
    from models.interface import ModelConfig

_STAGE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of stages that are tried; a few more or less change little."""
_WHOLE_NODE, _MOST_NODES = 8, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A topology with the options and machines that it was made for."""

    args: PlanArgs
    machines: Hardware
    topology: Topology

    @property
    def fits(self) -> bool:
        """Whether there is room for everything."""
        return not self.topology.reasons


def choose(config: ModelConfig, args: PlanArgs) -> Choice:
    """The topology with the highest bound at the asked concurrency among those that fit.

    Among equals the first, with the fewest stages; where none fits, the one that lacks least.
    Raises ConfigError when no topology at all is possible.
    """
    machines, asked = hardware(args), layout(args)
    refusal: ConfigError | None = None
    best: tuple[tuple[float, float], Topology] | None = None
    for stages, shards in _candidates(config, args, machines, asked):
        serve = args.serve_args(stages, shards)
        try:
            spec = group_spec(serve, Path(args.model), config)
        except ConfigError as error:
            refusal = refusal or error
            continue
        topology = place(config, spec, machines, asked, serve.cpus_per_actor)
        speed = 0.0
        if not topology.reasons:
            bound = decode_bound(config, topology, machines, args.concurrency)
            speed = bound.tokens_per_second
        rank = (-float(topology.excess), speed)
        if best is None or rank > best[0]:
            best = (rank, topology)
    if best is None:
        assert refusal is not None, "there is always a candidate"
        raise refusal
    return Choice(args=args, machines=machines, topology=best[1])


def _candidates(
    config: ModelConfig, args: PlanArgs, machines: Hardware, layout: str
) -> Iterator[tuple[int | None, int | None]]:
    """Stages and expert shards to try, as far as they are left open.

    On CPUs the defaults of `conclave serve`.
    """
    gpus = machines.num_gpus
    if not gpus:
        yield args.stages, args.expert_shards
        return
    if args.stage_layers is not None:
        stages = num_stages(args.serve_args(args.stages, args.expert_shards))
        yield args.stages, _num_shards(config, args, gpus, stages, layout)
        return
    stage_counts = [n for n in _STAGE_COUNTS if n <= min(gpus, config.num_layers)]
    if gpus <= config.num_layers and gpus not in stage_counts:
        stage_counts.append(gpus)
    for stages in [args.stages] if args.stages else stage_counts:
        yield stages, _num_shards(config, args, gpus, stages, layout)


def _num_shards(
    config: ModelConfig, args: PlanArgs, gpus: int, stages: int, layout: str
) -> int | None:
    """One per GPU, or per GPU without a stage, as far as there are experts for them."""
    if args.expert_shards is not None or not moe_layers(config):
        return args.expert_shards
    free = gpus if layout == "colocated" else gpus - stages
    return max(1, min(free, config.num_experts * args.expert_replicas))


def alternatives(config: ModelConfig, choice: Choice) -> Iterator[Choice]:
    """What has room where `choice` has not, nearest first: the fewest machines of the same kind
    with the same options, int8 experts on the same machines, fewer sequences on them."""
    args = choice.args
    yield from _first_that_fits(config, _more_machines(args))
    if args.quantization == "none" and moe_layers(config):
        yield from _first_that_fits(
            config, iter([args.model_copy(update={"quantization": "int8"})])
        )
    yield from _first_that_fits(config, _fewer_sequences(args))


def _more_machines(args: PlanArgs) -> Iterator[PlanArgs]:
    """Actors are left to the plan: those that were asked for had no room."""
    if not args.gpus_per_node:
        return
    freed = args.model_copy(update={"stages": None, "expert_shards": None, "stage_layers": None})
    gpus_per_node = [args.gpus_per_node]
    if args.nodes == 1:  # part of a node, before there are more
        gpus_per_node += [n for n in (2, 4, _WHOLE_NODE) if n > args.gpus_per_node]
    for gpus in gpus_per_node:
        yield freed.model_copy(update={"gpus_per_node": gpus})
    nodes = args.nodes
    while nodes < _MOST_NODES:
        nodes += 1 if nodes < 4 else nodes // 4
        yield freed.model_copy(update={"gpus_per_node": gpus_per_node[-1], "nodes": nodes})


def _fewer_sequences(args: PlanArgs) -> Iterator[PlanArgs]:
    sequences = args.concurrency // 2
    while sequences:
        yield args.model_copy(update={"concurrency": sequences})
        sequences //= 2


def _first_that_fits(config: ModelConfig, options: Iterator[PlanArgs]) -> Iterator[Choice]:
    for args in options:
        try:
            found = choose(config, args)
        except ConfigError:
            continue
        if found.fits:
            yield found
            return
