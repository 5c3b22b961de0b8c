"""Simulated machines of a Ray cluster, as a line of JSON describes them, until standard input ends.

A program of its own: Ray reads its settings from the environment once per process.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

# Requests and answers alone pass the object store.
SMALL = {"object_store_memory": 80 * 2**20}


def main() -> None:
    """Start head and workers, say where they are, wait, end them."""
    asked = json.loads(sys.stdin.readline())
    dashboard = {"include_dashboard": True, "dashboard_port": asked["dashboard_port"]}
    head = {**SMALL, **asked["head"], **dashboard, "dashboard_host": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(**SMALL, **worker).node_id for worker in asked["workers"]]
        assert cluster.head_node is not None
        found = {"head": cluster.head_node.node_id, "workers": workers}
        print(json.dumps(found), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
