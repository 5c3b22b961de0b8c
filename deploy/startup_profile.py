"""`conclave serve --profile-startup`: from the command to `ready`, part by part."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from deploy.replica_start import ReplicaStart
from shards.process_birth import age_s
from shards.start_record import WorkerStart


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table: what, where, how long, and whether Ray's time it is."""

    name: str
    where: str
    seconds: float
    rays: bool = False


class CommandClock:
    """The command's own marks; the first part began with its process."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.parts: dict[str, float] = {"imports": age_s()}

    def mark(self, name: str) -> None:
        """What went on since the last mark is over."""
        now = time.monotonic()
        self.parts[name] = now - self._last
        self._last = now


def startup_parts(command: dict[str, float], replica: ReplicaStart) -> list[Part]:
    """One after the other: the command's parts, inside `application` those of a replica.

    Of its workers, which start side by side, those of the one that was there last.
    """
    application_s = command.get("application", 0.0)
    outside_s = max(0.0, application_s - replica.imports_s - replica.inside_s)
    group = replica.group
    return [
        Part("imports", "command", command.get("imports", 0.0)),
        Part("checks", "command", command.get("checks", 0.0)),
        Part("Ray", "command", command.get("Ray", 0.0), rays=True),
        Part("Serve", "command", command.get("Serve", 0.0), rays=True),
        Part("placement", "replica", outside_s, rays=True),
        Part("imports", "replica", replica.imports_s),
        Part("kernels", "replica", replica.kernels_s),
        Part("tokenizer", "replica", replica.tokenizer_s),
        *_worker_parts(group.workers[-1] if group.workers else None),
        Part("warm-up", "instance", group.connect_s),
        Part("first token", "instance", group.first_token_s),
        Part("rest", "replica", replica.rest_s),
        Part("ready", "command", command.get("ready", 0.0)),
    ]


def _worker_parts(last: WorkerStart | None) -> Iterator[Part]:
    if last is not None:
        yield Part("placement", last.worker, last.placement_s, rays=True)
        yield Part("imports", last.worker, last.times.imports_s)
        yield Part("read", last.worker, last.times.read_s)
        yield Part("init", last.worker, last.times.init_s)


def startup_table(parts: list[Part], replica: ReplicaStart) -> str:
    """For people: every part, when it ended, and what each worker took."""
    lines, at = ["start-up                    seconds     until"], 0.0
    for part in parts:
        at += part.seconds
        lines.append(f"  {part.name:<12} {part.where:<12} {part.seconds:8.2f}  {at:8.2f}")
    rays_s = sum(part.seconds for part in parts if part.rays)
    lines.append(f"  in all {at:.2f} s: {rays_s:.2f} s Ray's, {at - rays_s:.2f} s ours")
    lines.append("worker          placement  imports     read     init      bytes read")
    for worker in replica.group.workers:
        times = worker.times
        seconds = (worker.placement_s, times.imports_s, times.read_s, times.init_s)
        cells = " ".join(f"{each:8.2f}" for each in seconds)
        lines.append(f"  {worker.worker:<14} {cells}  {worker.num_bytes:14,}")
    return "\n".join(lines)


def startup_json(parts: list[Part], replica: ReplicaStart) -> str:
    """For programs: the same numbers, unrounded."""
    whole_s = sum(part.seconds for part in parts)
    rays_s = sum(part.seconds for part in parts if part.rays)
    document: dict[str, Any] = {
        "seconds": whole_s,
        "ray_seconds": rays_s,
        "own_seconds": whole_s - rays_s,
        "parts": [asdict(part) for part in parts],
        "replica": asdict(replica),
    }
    return json.dumps(document, indent=2) + "\n"
