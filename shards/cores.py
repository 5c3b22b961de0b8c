"""How many cores this process may use, and how the actors of a model instance share them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

from models.kernels.choice import TORCH, backends
from shards.spec import GroupSpec

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_SPIN_SECONDS = 100e-6


def available_cores(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> int:
    """Cores that affinity and the cgroups around this process leave it, at least one."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *map(ceil, _quotas(membership, cgroups))]))


def _quotas(membership: Path, cgroups: Path) -> Iterator[float]:
    """Cores that each cgroup around the process pays for (cgroup v2, `cpu.max`)."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None:
        return
    path = PurePosixPath(own.lstrip("/"))
    for folder in (path, *path.parents):
        try:
            quota, period = (cgroups / folder / "cpu.max").read_text(encoding="utf-8").split()
        except OSError:  # the root has none, nor has a cgroup that is not mounted here
            continue
        if quota != "max":
            yield int(quota) / int(period)


def num_compute_actors(group: GroupSpec) -> int:
    """Stages and expert actors; the one engine where it computes itself."""
    return 1 if group.executor == "local" else len(group.stage_layers) + group.num_expert_shards


def default_threads(kernels: str, cores: int, actors: int) -> int:
    """Compute threads of each of the `actors` that share a node's cores.

    One where PyTorch computes any kernel: its bits may depend on how many threads share a product.
    """
    return 1 if TORCH in backends(kernels).values() else max(1, cores // actors)


def spin_seconds(group: GroupSpec, cores: int) -> float:
    """How long a worker looks for frames before it sleeps, where every worker has a core here.

    As long as waking up takes; on shared cores a spinning worker would delay whom it waits for.
    """
    busy = num_compute_actors(group) * group.threads
    dispatchers = 1 if group.num_expert_shards else 0
    return _SPIN_SECONDS if busy + dispatchers <= cores else 0.0


def sleep_while_waiting() -> None:
    """Make OpenMP's threads give their cores away between kernels; before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
