"""A model instance on a simulated cluster whose nodes are taken away; prints what came of it.

A program of its own: Ray reads its settings from the environment once per process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group

from deploy.config import parse_args
from deploy.resolve import resolve
from router.step import SamplingParams
from router.transport.sockets import SocketTransport
from shards.client import GroupState, GroupUnavailable
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.ray_launcher import RayLauncher
from tests.groups import ask_all, healed

GREEDY = SamplingParams(max_tokens=200, temperature=0.0, logprobs=1)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 30)]
OPTIONS = {"model": "nano-dbrx", "dtype": "float32", "executor": "pipeline"}
WORKER = {"CPU": 0.1, "work": 1.0}


async def run(group: ModelGroup, cluster: Cluster, nodes: list[Any]) -> dict[str, Any]:
    """Lose the node that the workers are on twice: with another one there, and without."""
    expected = await ask_all(group, PROMPTS, GREEDY)
    where = {w.node_id for w in group.workers() if w.role in ("stage", "expert")}
    first = next(node for node in nodes if node.node_id in where)
    (other,) = [node for node in nodes if node is not first]
    asked = asyncio.create_task(ask_all(group, PROMPTS, GREEDY))
    stream = group.generate((7, 8, 9), GREEDY)
    async for token in stream:
        if token.position == 4:
            break
    stream.abort()
    in_the_middle = not asked.done()
    cluster.remove_node(first, allow_graceful=False)
    unchanged = await asyncio.wait_for(asked, 60) == expected
    await healed(group)
    moved = {w.node_id for w in group.workers() if w.role in ("stage", "expert")}

    cluster.remove_node(other, allow_graceful=False)
    waited, refused = None, None
    began = time.monotonic()
    try:
        await ask_all(group, PROMPTS, GREEDY)
    except GroupUnavailable as error:
        waited = time.monotonic() - began
        refused = error.retry_after_s
    state, trouble = group.state, group.trouble
    at_once = False
    try:
        group.generate(PROMPTS[0], GREEDY)
    except GroupUnavailable:
        at_once = True
    cluster.add_node(num_cpus=1, resources={"work": 2})
    await healed(group)
    return {
        "in_the_middle": in_the_middle,
        "unchanged": unchanged,
        "moved": moved == {other.node_id},
        "waited_s": waited,
        "retry_after_s": refused,
        "state": str(state),
        "trouble": trouble is not None and trouble.worker,
        "refused_at_once": at_once,
        "healed": group.state is GroupState.READY,
        "answers_again": await ask_all(group, PROMPTS, GREEDY) == expected,
    }


def main() -> None:
    """Build the cluster, start the group, take nodes away."""
    logging.basicConfig(level=logging.WARNING)
    head = {"num_cpus": 1, "resources": {"head": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, resources={"work": 2}) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        bundles = [{"CPU": 0.3, "head": 1.0}, WORKER, WORKER]
        placed = placement_group(bundles, strategy="PACK")
        ray.get(placed.ready(), timeout=60)
        spec = resolve(parse_args({**OPTIONS, "recovery_timeout": 20})).spec
        launcher = RayLauncher("conclave/test/r", placed, 0.1)
        group = ModelGroup(spec, launcher, SocketTransport(INGRESS, spec.secret))
        group.start(timeout=120)
        try:
            print(json.dumps(asyncio.run(run(group, cluster, nodes))), flush=True)
        finally:
            group.stop()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
