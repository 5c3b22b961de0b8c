"""Workers as Ray actors inside the replica's placement group."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from shards.actors import DispatcherActor, EngineActor, ExpertActor, StageActor
from shards.bundles import bundle_index
from shards.control import Started
from shards.cores import num_compute_actors
from shards.launcher import WorkerEvents
from shards.ray_actors import ActorPlaces, Background, kill
from shards.ray_spares import RaySpares
from shards.spec import GroupSpec, Role, WorkerSpec, worker_specs

_SHELLS = {
    Role.ENGINE: EngineActor,
    Role.STAGE: StageActor,
    Role.DISPATCHER: DispatcherActor,
    Role.EXPERT: ExpertActor,
}


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
        self._places = ActorPlaces(prefix, group)
        self._background = Background()
        self._spares = RaySpares(self._places, self._background)
        self._num_cpus = num_cpus
        self._actors: dict[WorkerSpec, Any] = {}
        # Never held across a call into Ray: its own threads take this lock too.
        self._lock = threading.Lock()
        self._closing = False

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Start the worker on a thread of its own: placement may have to wait for a node."""
        self._spares.on_spawn(spec)
        self._background.call(self._spawn, spec, events)

    def _spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        try:
            nodes = self._places.nodes()
            actor = self._spares.take(nodes.get(bundle_index(spec), "")) or self._create(spec)
            self._register(spec, actor)
            place = f"{self._places.prefix}/{spec.peer}"
            called = actor.start.remote(spec, place, self._places.spans_nodes)
            started: Future[Started] = called.future()
        except Exception as error:  # Ray raises many kinds; each means that nothing was started.
            self._on_died(spec, events, f"cannot be created: {error}")
            return
        started.add_done_callback(partial(self._on_started, actor, spec, events))

    def _create(self, spec: WorkerSpec) -> Any:
        # A successor may be created before Ray has forgotten its predecessor's name.
        name = f"{spec.peer}.{spec.incarnation}" if spec.incarnation else spec.peer
        shell, bundle = ray.remote(_SHELLS[spec.role]), bundle_index(spec)
        return self._places.create(shell, name, bundle, (), num_cpus=self._num_cpus)

    def _register(self, spec: WorkerSpec, actor: Any) -> None:
        with self._lock:
            closing = self._closing
            if not closing:
                self._actors[spec] = actor
        if closing:
            kill(actor)
            raise RuntimeError("the group is stopping")

    def _on_started(
        self, actor: Any, spec: WorkerSpec, events: WorkerEvents, future: Future[Started]
    ) -> None:
        error = future.exception()
        if error is not None:
            # A ValueError is our own verdict on checkpoint or configuration: trying again is vain.
            cause = getattr(error, "cause", None)
            self._background.call(kill, actor)
            self._on_died(spec, events, str(cause or error), isinstance(cause, ValueError))
            return
        events.started(spec, future.result())
        self._spares.on_answered(spec)
        ended: Future[None] = actor.run.remote().future()
        ended.add_done_callback(partial(self._on_ended, actor, spec, events))

    def _on_ended(
        self, actor: Any, spec: WorkerSpec, events: WorkerEvents, future: Future[None]
    ) -> None:
        error = future.exception()
        # Its process may live, and hold the weights, for as long as anybody knows the actor.
        self._background.call(kill, actor)
        self._on_died(spec, events, str(error) if error else "its data loop returned")

    def _on_died(
        self, spec: WorkerSpec, events: WorkerEvents, reason: str, fatal: bool = False
    ) -> None:
        with self._lock:
            self._actors.pop(spec, None)
        self._spares.on_died(spec)
        events.died(spec, reason, fatal)

    def discard(self, spec: WorkerSpec) -> None:
        """Kill one incarnation."""
        with self._lock:
            actor = self._actors.pop(spec, None)
        if actor is not None:
            kill(actor)

    def close(self) -> None:
        """Kill what is left of the actors."""
        with self._lock:
            self._closing = True
            actors, self._actors = self._actors, {}
        self._spares.close()
        for actor in actors.values():
            kill(actor)
        self._background.close()
