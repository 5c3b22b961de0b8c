"""Actors on GPUs and nodes, and whether there is room for them: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.bundles import cpus_of_bundles, spread_over
from deploy.plan_actors import ActorNeeds, Memory, actor_needs
from deploy.plan_options import Hardware
from shards.bundles import bundle_index, most_nodes
from shards.cache_budget import USABLE, size_text
from shards.spec import GroupSpec, Role, WorkerSpec

if TYPE_CHECKING:
    from models.interface import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedActor:
    """One actor in its place. `gpu` is that of its node, None on CPU."""

    needs: ActorNeeds
    bundle: int
    node: int
    gpu: int | None
    process: str
    """The actor whose process it lives in."""

    @property
    def gpu_bytes(self) -> int:
        """That it takes of its GPU."""
        return 0 if self.gpu is None else self.needs.memory.computing

    @property
    def cpu_bytes(self) -> int:
        """That it takes of its node."""
        memory = self.needs.memory
        process = memory.process if self.process == self.needs.name else 0
        return process + (memory.computing if self.gpu is None else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """One model instance on its machines; `reasons` say what has no room."""

    spec: GroupSpec
    layout: str
    actors: tuple[PlacedActor, ...]
    bundle_cpus: tuple[float, ...]
    reasons: tuple[str, ...]
    excess: int
    """Bytes that the fullest device lacks."""

    @property
    def num_nodes(self) -> int:
        """Nodes that it is on."""
        return 1 + max(actor.node for actor in self.actors)


def place(
    config: ModelConfig, spec: GroupSpec, machines: Hardware, layout: str, cpus_per_actor: float
) -> Topology:
    """Give every actor of `spec` a bundle, a node and, where there are any, a GPU."""
    on_gpu = machines.num_gpus > 0
    nodes = min(machines.nodes, most_nodes(spec))
    if nodes > 1 and not on_gpu:
        spec = spread_over(spec, nodes)
    needs = actor_needs(config, spec, on_gpu)
    computing = _processes([n for n in needs if n.layers or n.experts], layout)
    actors = [
        PlacedActor(needs=each, bundle=0, node=0, gpu=None, process=each.name)
        for each in needs
        if not (each.layers or each.experts)
    ]
    for number, process in enumerate(computing):
        bundle, node, gpu = _where(spec, machines, number, process[0])
        actors += [
            PlacedActor(needs=each, bundle=bundle, node=node, gpu=gpu, process=process[0].name)
            for each in process
        ]
    reasons, excess = _shortages(spec, actors, len(computing), machines)
    num_bundles = 1 + max(actor.bundle for actor in actors)
    return Topology(
        spec=spec,
        layout=layout,
        actors=tuple(actors),
        bundle_cpus=tuple(cpus_of_bundles(spec, cpus_per_actor)[:num_bundles]),
        reasons=tuple(reasons),
        excess=excess,
    )


def _where(
    spec: GroupSpec, machines: Hardware, number: int, actor: ActorNeeds
) -> tuple[int, int, int | None]:
    """Bundle, node and GPU of the process `number`, whose first actor is given."""
    if machines.num_gpus:
        node, gpu = divmod(number, machines.gpus_per_node)
        return 0 if spec.executor == "local" else 1 + number, node, gpu
    bundle = bundle_index(WorkerSpec(group=spec, role=Role(actor.role), index=actor.index))
    return bundle, 0 if spec.num_nodes is None else bundle, None


def node_bytes(spec: GroupSpec, actors: Sequence[PlacedActor]) -> int:
    """Host memory that the actors of one node need, and a warm spare beside them.

    Caches on CPUs are sized by what is free once weights are loaded: serving gives them no more
    than the share `USABLE` of it; the rest is for activations.
    """
    on_host = [actor.needs.memory if actor.gpu is None else Memory() for actor in actors]
    caches = sum(memory.caches for memory in on_host)
    activations = sum(memory.activations for memory in on_host)
    fixed = sum(actor.cpu_bytes for actor in actors) - caches - activations
    if spec.warm_spare:
        fixed += max(actor.needs.memory.process for actor in actors)
    return fixed + max(round(caches / USABLE), caches + activations)


def _processes(computing: Sequence[ActorNeeds], layout: str) -> list[tuple[ActorNeeds, ...]]:
    """Who computes in one process, in the order of bundles.

    Colocated: one expert shard per process, and the stages spread evenly over the processes.
    """
    stages = [each for each in computing if each.role == Role.STAGE]
    experts = [each for each in computing if each.role == Role.EXPERT]
    if layout != "colocated" or not stages:
        return [(each,) for each in computing]
    count = max(len(stages), len(experts))
    processes: list[list[ActorNeeds]] = [[] for _ in range(count)]
    for stage in stages:
        processes[stage.index * count // len(stages)].append(stage)
    for expert in experts:
        processes[expert.index * count // len(experts)].append(expert)
    return [tuple(process) for process in processes]


def _shortages(
    spec: GroupSpec, actors: Sequence[PlacedActor], num_processes: int, machines: Hardware
) -> tuple[list[str], int]:
    if machines.num_gpus:
        return _gpu_shortages(actors, num_processes, machines)
    if machines.node_memory is None:
        return [], 0
    reasons, excess = [], 0
    for node in sorted({actor.node for actor in actors}):
        needed = node_bytes(spec, [actor for actor in actors if actor.node == node])
        if needed > machines.node_memory:
            reasons.append(
                f"node {node} needs {size_text(needed)}, but has {size_text(machines.node_memory)}"
            )
            excess = max(excess, needed - machines.node_memory)
    return reasons, excess


def _gpu_shortages(
    actors: Sequence[PlacedActor], num_processes: int, machines: Hardware
) -> tuple[list[str], int]:
    if num_processes > machines.num_gpus:
        return [
            f"{num_processes} GPUs are needed, one per process, but there are {machines.num_gpus}"
        ], sum(actor.gpu_bytes for actor in actors)
    reasons, excess = [], 0
    for node, gpu in sorted({(a.node, a.gpu) for a in actors if a.gpu is not None}):
        here = [actor for actor in actors if (actor.node, actor.gpu) == (node, gpu)]
        needed = sum(actor.gpu_bytes for actor in here)
        if needed > machines.usable_gpu_memory:
            names = ", ".join(actor.needs.name for actor in here)
            reasons.append(
                f"GPU {gpu} of node {node} ({names}) needs {size_text(needed)}, but "
                f"{size_text(machines.usable_gpu_memory)} of its "
                f"{size_text(machines.gpu_memory)} can be used"
            )
            excess = max(excess, needed - machines.usable_gpu_memory)
    return reasons, excess
