"""Spare actors, one per node of a placement group: made, watched and taken."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray

from shards.actors import SpareActor
from shards.ray_actors import ActorPlaces, Background, kill
from shards.spares import Spares
from shards.spec import GroupSpec, WorkerSpec

log = logging.getLogger("conclave.launcher")

_WATCH = "watch"
"""A concurrency group of a spare: while one call waits there, others are answered."""
_ALIVE_S = 1.0
"""A spare that takes longer to answer hangs: another actor is started instead."""


class RaySpares:
    """`Spares` whose processes are actors `{prefix}/spare-{n}`. Thread-safe."""

    def __init__(self, places: ActorPlaces, background: Background) -> None:
        self._places = places
        self._background = background
        self._spares: Spares[Any] = Spares()
        self._numbers = itertools.count()
        # Never held across a call into Ray: its own threads take this lock too.
        self._lock = threading.Lock()

    def on_spawn(self, spec: WorkerSpec) -> None:
        """A worker starts."""
        with self._lock:
            self._spares.on_spawn(spec)

    def on_answered(self, spec: WorkerSpec) -> None:
        """A worker has loaded; when it was the last one to, spares that are missing are made."""
        with self._lock:
            self._spares.on_answered(spec)
        if spec.group.warm_spare:
            self._background.call(self._make, spec.group)

    def on_died(self, spec: WorkerSpec) -> None:
        """A worker ended."""
        with self._lock:
            self._spares.on_died(spec)

    def take(self, node: str) -> Any:
        """The warm spare of a node, the caller's from now on; None where none answers."""
        with self._lock:
            spare = self._spares.take(node)
        if spare is not None:
            try:
                ray.get(spare.is_warm.remote(), timeout=_ALIVE_S)
            except ray.exceptions.RayError as error:
                log.warning("a spare does not answer: %s", error)
                kill(spare)
                return None
        return spare

    def close(self) -> None:
        """End them all and make no more."""
        with self._lock:
            spares = self._spares.close()
        for spare in spares:
            kill(spare)

    def _make(self, group: GroupSpec) -> None:
        by_bundle = self._places.nodes() or {0: ""}
        bundles = {node: bundle for bundle, node in sorted(by_bundle.items(), reverse=True)}
        with self._lock:
            nodes = self._spares.wanted(bundles)
        for node in nodes:
            try:
                self._make_one(group, node, bundles[node])
            except Exception as error:  # Ray raises many kinds; each means that there is none.
                log.warning("a spare cannot be created: %s", error)
                with self._lock:
                    self._spares.give_up(node)

    def _make_one(self, group: GroupSpec, node: str, bundle: int) -> None:
        name = f"spare-{next(self._numbers)}"
        shell = ray.remote(concurrency_groups={_WATCH: 1})(SpareActor)
        # The bundle's CPUs are its workers'.
        spare = self._places.create(shell, name, bundle, (group,), num_cpus=0)
        with self._lock:
            wanted = self._spares.put(node, spare)
        if not wanted:
            kill(spare)
            return
        warm: Future[bool] = spare.is_warm.remote().future()
        warm.add_done_callback(partial(self._on_warm, spare))
        ended: Future[None] = spare.wait.options(concurrency_group=_WATCH).remote().future()
        ended.add_done_callback(partial(self._on_ended, spare, group))

    def _on_warm(self, spare: Any, future: Future[bool]) -> None:
        if future.exception() is None:
            with self._lock:
                self._spares.on_warm(spare)

    def _on_ended(self, spare: Any, group: GroupSpec, future: Future[None]) -> None:
        with self._lock:
            was_waiting = self._spares.on_ended(spare, time.monotonic())
        if was_waiting:
            log.info("a spare has ended: %s", future.exception())
            self._background.call(self._make, group)
