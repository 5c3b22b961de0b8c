"""Workers as Ray actors inside the replica's placement group."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shards.actors import DispatcherActor, EngineActor, ExpertActor, StageActor
from shards.control import Started
from shards.cores import num_compute_actors
from shards.group import WorkerEvents
from shards.spec import GroupSpec, Role, WorkerSpec, worker_specs

log = logging.getLogger("conclave.launcher")

_SHELLS = {
    Role.ENGINE: EngineActor,
    Role.STAGE: StageActor,
    Role.DISPATCHER: DispatcherActor,
    Role.EXPERT: ExpertActor,
}


def bundle_index(spec: WorkerSpec) -> int:
    """Bundle 0 holds ingress, engine and dispatcher; then one per stage, one per expert actor."""
    match spec.role:
        case Role.STAGE:
            return 1 + spec.index
        case Role.EXPERT:
            return 1 + len(spec.group.stage_layers) + spec.index
        case _:
            return 0


def compute_actors_together(group: GroupSpec, placed: PlacementGroup | None) -> int:
    """How many compute actors the fullest node of a placement group has."""
    if placed is None or group.executor == "local":
        return num_compute_actors(group)
    nodes = placement_group_table(placed)["bundles_to_node_id"]
    computing = [w for w in worker_specs(group) if w.role in (Role.STAGE, Role.EXPERT)]
    return max(Counter(nodes[bundle_index(worker)] for worker in computing).values())


class RayLauncher:
    """Starts actors `{prefix}/{role}-{index}`; a pending `run` call that ends is a death.

    Actors never restart by themselves: the supervisor decides. They die with the process that
    made this launcher.
    """

    def __init__(self, prefix: str, group: PlacementGroup | None, num_cpus: float) -> None:
        self._prefix = prefix
        self._group = group
        self._num_cpus = num_cpus
        self._actors: dict[WorkerSpec, Any] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._spans_nodes = False

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Create the actor on a thread of its own: placement may have to wait for a node."""
        threading.Thread(target=self._spawn, args=(spec, events), daemon=True).start()

    def _spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        try:
            actor = self._create(spec)
        except Exception as error:  # Ray raises many kinds; each means that nothing was started.
            events.died(spec, f"cannot be created: {error}", False)
            return
        started: Future[Started] = actor.start.remote(self._across_nodes()).future()
        started.add_done_callback(partial(self._on_started, actor, spec, events))

    def _create(self, spec: WorkerSpec) -> Any:
        options: dict[str, Any] = {
            "name": self._name(spec),
            "num_cpus": self._num_cpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._group,
                placement_group_bundle_index=bundle_index(spec),
                placement_group_capture_child_tasks=True,
            )
        level = logging.getLogger("conclave").getEffectiveLevel()
        actor = ray.remote(_SHELLS[spec.role]).options(**options).remote(spec, level)
        # Never held across a call into Ray: its own threads take this lock too.
        with self._lock:
            closing = self._closing
            if not closing:
                self._actors[spec] = actor
        if closing:
            _kill(actor)
            raise RuntimeError("the group is stopping")
        return actor

    def _name(self, spec: WorkerSpec) -> str:
        # A successor may be created before Ray has forgotten its predecessor's name.
        name = f"{self._prefix}/{spec.peer}"
        return f"{name}.{spec.incarnation}" if spec.incarnation else name

    def _across_nodes(self) -> bool:
        """Whether some actors of the group can only be reached over TCP."""
        if self._group is None:
            return False
        nodes = placement_group_table(self._group)["bundles_to_node_id"].values()
        # While the bundles of a lost node wait for another one they have none: once across nodes,
        # always across nodes.
        self._spans_nodes = self._spans_nodes or len({node for node in nodes if node}) > 1
        return self._spans_nodes

    def _on_started(
        self, actor: Any, spec: WorkerSpec, events: WorkerEvents, future: Future[Started]
    ) -> None:
        error = future.exception()
        if error is not None:
            # A ValueError is our own verdict on checkpoint or configuration: trying again is vain.
            cause = getattr(error, "cause", None)
            events.died(spec, str(cause or error), isinstance(cause, ValueError))
            return
        events.started(spec, future.result())
        ended: Future[None] = actor.run.remote().future()
        ended.add_done_callback(partial(self._on_ended, spec, events))

    def _on_ended(self, spec: WorkerSpec, events: WorkerEvents, future: Future[None]) -> None:
        with self._lock:
            self._actors.pop(spec, None)
        error = future.exception()
        events.died(spec, str(error) if error else "its data loop returned", False)

    def discard(self, spec: WorkerSpec) -> None:
        """Kill one incarnation."""
        with self._lock:
            actor = self._actors.pop(spec, None)
        if actor is not None:
            _kill(actor)

    def close(self) -> None:
        """Kill what is left of the actors."""
        with self._lock:
            self._closing = True
            actors, self._actors = self._actors, {}
        for actor in actors.values():
            _kill(actor)


def _kill(actor: Any) -> None:
    try:
        ray.kill(actor)
    except ray.exceptions.RayError as error:
        log.info("an actor was already gone: %s", error)
