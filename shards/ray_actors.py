"""Where a replica's actors run, and what they are called: its placement group and its prefix."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shards.logs import shown_format

log = logging.getLogger("conclave.launcher")


class ActorPlaces:
    """Makes actors `{prefix}/{name}` in the bundles of a placement group, or anywhere without one.

    They never restart by themselves, and die with the process that made them.
    """

    def __init__(self, prefix: str, group: PlacementGroup | None) -> None:
        self.prefix = prefix
        self.spans_nodes = False
        """Some actors can only be reached over TCP; as `nodes` last saw it."""
        self._group = group

    def nodes(self) -> dict[int, str]:
        """The node of each bundle that has one; without a placement group everything is on one."""
        if self._group is None:
            return {}
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        placed = {bundle: node for bundle, node in nodes.items() if node}
        # While the bundles of a lost node wait for another one they have none: once across nodes,
        # always across nodes.
        self.spans_nodes |= len(set(placed.values())) > 1
        return placed

    def create(
        self, actor: Any, name: str, bundle: int, arguments: tuple[Any, ...], **options: Any
    ) -> Any:
        """An actor of the Ray class `actor`, made of `arguments` and how this process logs."""
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._group,
                placement_group_bundle_index=bundle,
                placement_group_capture_child_tasks=True,
            )
        made = actor.options(
            name=f"{self.prefix}/{name}", max_restarts=0, max_task_retries=0, **options
        )
        level = logging.getLogger("conclave").getEffectiveLevel()
        return made.remote(*arguments, level, shown_format())


def kill(actor: Any) -> None:
    """End an actor outright; harmless when it is gone already."""
    try:
        ray.kill(actor)
    except ray.exceptions.RayError as error:
        log.info("an actor was already gone: %s", error)


def in_background(call: Callable[..., None], *arguments: Any) -> None:
    """Make a call that asks Ray, and may wait, on a thread of its own."""
    threading.Thread(target=call, args=arguments, daemon=True).start()
