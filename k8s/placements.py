"""`python -m k8s.placements`: the numbers of every overlay, from what `conclave plan` says.

Pods are as many as the plan has nodes, with its GPUs, cores and memory, and what Ray itself takes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from k8s.render import FOLDER

Plan = dict[str, Any]
_GIB = 1024**3
_RAY_MEMORY = 8 * _GIB
"""Raylet, agents, Serve's proxy and what they log, beside the actors."""
_RAY_CORES = 2
_MEMORY_STEP = 8
"""Memory in whole multiples of so many GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What is planned for one model, and what the plan does not say."""

    name: str
    instance: str
    plan: tuple[str, ...]
    """Arguments of `conclave plan`."""
    shm_gib: int
    """Ray's object store: requests and answers pass it, weights do not."""
    checkpoint: str | None = None
    """Its folder in the claim of the weights; None where it is in the image."""
    max_replicas: int = 1
    cores: int | None = None
    """Instead of the plan's, which has one for each thread that computes."""


def _gpus(model: str, nodes: int, each: int, context: int, *more: str) -> tuple[str, ...]:
    machines = ("--nodes", str(nodes), "--gpus-per-node", str(each), "--gpu-memory", "80GiB")
    return (model, *machines, "--context", str(context), "--concurrency", "64", *more)


OVERLAYS = (
    Overlay(
        name="nano",
        instance="conclave-nano",
        plan=("nano-jamba", "--gpus-per-node", "0", "--stages", "2", "--expert-shards", "2"),
        shm_gib=2,
        # Small enough for a laptop's cluster: the actors take turns.
        cores=2,
    ),
    Overlay(
        name="phi-3.5-moe",
        instance="conclave-phi-3-5-moe",
        plan=_gpus("phi-3.5-moe", 1, 2, 8192),
        shm_gib=8,
        checkpoint="Phi-3.5-MoE-instruct",
        max_replicas=2,
    ),
    Overlay(
        name="jamba-mini",
        instance="conclave-jamba-mini",
        plan=_gpus("jamba-mini", 1, 2, 32768),
        shm_gib=8,
        checkpoint="AI21-Jamba-Mini-1.7",
    ),
    Overlay(
        name="dbrx",
        instance="conclave-dbrx",
        plan=_gpus("dbrx", 2, 8, 32768),
        shm_gib=16,
        checkpoint="dbrx-instruct",
    ),
    Overlay(
        name="dbrx-4x4",
        instance="conclave-dbrx",
        plan=_gpus("dbrx", 4, 4, 32768),
        shm_gib=8,
        checkpoint="dbrx-instruct",
    ),
    Overlay(
        name="jamba-large",
        instance="conclave-jamba-large",
        plan=_gpus("jamba-large", 2, 8, 32768, "--quantization", "int8"),
        shm_gib=16,
        checkpoint="AI21-Jamba-Large-1.7",
    ),
)


def ask_plan(overlay: Overlay) -> Plan:
    """What `conclave plan --json` says of an overlay's model. Raises CalledProcessError."""
    command = [sys.executable, "-m", "deploy.cli", "plan", *overlay.plan, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    plan: Plan = json.loads(done.stdout)
    return plan


def pod_numbers(overlay: Overlay, plan: Plan) -> dict[str, str]:
    """The data of an overlay's placement.yaml: texts, as ConfigMaps hold them."""
    nodes = [node for node in plan["nodes"] if node["bundles"]]
    actors = max(node["cpu_memory_bytes"] for node in nodes)
    memory_gib = (actors + _RAY_MEMORY) / _GIB + overlay.shm_gib
    cores = overlay.cores or max(node["cpu_cores"] for node in nodes) + _RAY_CORES
    numbers = {
        "instance": overlay.instance,
        "workers": str(len(nodes)),
        "max_workers": str(len(nodes) * overlay.max_replicas),
        "cpu": str(cores),
        "memory": f"{math.ceil(memory_gib / _MEMORY_STEP) * _MEMORY_STEP}Gi",
        "shm": f"{overlay.shm_gib}Gi",
    }
    if overlay.checkpoint is not None:
        gpus = max(node["gpu_count"] for node in nodes)
        numbers |= {"gpus": str(gpus), "checkpoint": overlay.checkpoint}
    return numbers


def placement_text(overlay: Overlay, plan: Plan) -> str:
    """An overlay's placement.yaml: read by kustomize, no object of the cluster."""
    lines = [
        "# Written by `python -m k8s.placements` from what `conclave plan` says: do not edit.",
        f"# conclave plan {' '.join(overlay.plan)}",
        "apiVersion: v1",
        "kind: ConfigMap",
        "metadata:",
        "  name: placement",
        "  annotations:",
        '    config.kubernetes.io/local-config: "true"',
        "data:",
        *(f"  {key}: {json.dumps(value)}" for key, value in pod_numbers(overlay, plan).items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write all of them; `python -m k8s.render` is to follow."""
    for overlay in OVERLAYS:
        file = FOLDER / "overlays" / overlay.name / "placement.yaml"
        file.write_text(placement_text(overlay, ask_plan(overlay)), encoding="utf-8")
        print(file.relative_to(FOLDER.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
