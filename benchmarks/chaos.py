"""Faults under load: workers killed and stopped, connections broken and slowed, nodes removed.

.venv/bin/python -m benchmarks.chaos --model nano-jamba --requests 2000 --json chaos.json

Requests arrive at the times of a Poisson process, whatever becomes of the instance. After an
undisturbed while the faults begin, one kind of actor after the other, each a few seconds after the
instance is whole again. Every stream is compared with the answer of one undisturbed process, token
by token and logprob by logprob. The exit code is 1 when a stream failed, was truncated or changed,
when a fault was not healed, or when anything is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.accounts import Account, as_json, draw_up, table
from benchmarks.faults.dead_shard import DeadShard, measure_dead_shard
from benchmarks.faults.injector import Nodes, Pace
from benchmarks.faults.instances import Instance, subprocess_instance, undisturbed_answers
from benchmarks.faults.kinds import SIGNALS, WIRE, Fault, node_losses, rotation, wire_rotation
from benchmarks.faults.leftovers import Belongings
from benchmarks.faults.ray_instance import ray_instance
from benchmarks.faults.requests import arrival_times, draw_requests
from benchmarks.faults.storm import storm
from benchmarks.faults.wire import Wire
from deploy.demo import NANO_MODELS

log = logging.getLogger("conclave.chaos")

PARTS = ("processes", "connections", "dead-shard", "nodes")
_SHARE = {"processes": 0.75, "connections": 0.25, "nodes": 1.0}
"""Of the requests, by part, when parts share them."""


class Run:
    """One model: its requests, what they must be answered, and the parts of its chaos."""

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        self._options = options
        self._model = model
        self._requests = draw_requests(options.seed, min(options.distinct, options.requests))
        begin = time.monotonic()
        self._expected = undisturbed_answers(model, self._requests)
        seconds = time.monotonic() - begin
        log.info("%s: %d answers undisturbed in %.1f s", model, len(self._expected), seconds)

    def part(self, name: str) -> Account:
        """A fresh instance under load and faults, and what they left behind."""
        options, belongings = self._options, Belongings()
        share = _SHARE[name] / sum(_SHARE[part] for part in options.parts if part in _SHARE)
        arrivals = arrival_times(options.seed, round(options.requests * share), options.rate)
        with ExitStack() as stack:
            wire = stack.enter_context(closing(Wire(options.wire))) if name == PARTS[1] else None
            instance, nodes = self._start(stack, wire)
            happened = asyncio.run(
                storm(
                    instance.group,
                    self._requests,
                    arrivals,
                    self._faults(name, instance, wire),
                    calm_s=options.calm,
                    pace=Pace(pause=options.pause, patience=options.patience),
                    wire=wire,
                    nodes=nodes,
                )
            )
            belongings.look()
        account = draw_up(
            f"{self._model}, {name}",
            happened.records,
            self._expected,
            happened.happenings,
            happened.calm,
            options.seed,
        )
        return replace(account, leftovers=tuple(belongings.left(instance.launcher.addresses)))

    def dead_shard(self) -> DeadShard:
        """Throughput with one expert worker dead and not started again."""
        options = self._options
        with ExitStack() as stack:
            instance, _ = self._start(stack, None)
            return asyncio.run(
                measure_dead_shard(
                    instance, options.expert_shards, options.rounds, options.round_seconds
                )
            )

    def _start(self, stack: ExitStack, wire: Wire | None) -> tuple[Instance, Nodes | None]:
        options = self._options
        layout: dict[str, Any] = {
            "model": self._model,
            "stages": options.stages,
            "expert_shards": options.expert_shards,
            "expert_replicas": options.expert_replicas,
            "dispatch": options.dispatch,
        }
        if options.cluster == "ray":
            return stack.enter_context(ray_instance(layout, options.nodes, wire))
        return stack.enter_context(subprocess_instance(layout, wire)), None

    def _faults(self, name: str, instance: Instance, wire: Wire | None) -> Iterator[Fault]:
        options = self._options
        if name == "nodes":
            return node_losses(options.nodes)
        if wire is not None:
            kinds = [kind for kind in options.kinds if kind in WIRE]
            return wire_rotation(kinds, wire.links(), options.seed)
        kinds = [kind for kind in options.kinds if kind in SIGNALS]
        workers = [(worker.role, worker.index) for worker in instance.group.workers()]
        return rotation(kinds, workers, options.seed)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--model", nargs="+", default=["nano-jamba"], help=f"folders or {', '.join(NANO_MODELS)}")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    add("--kinds", nargs="+", choices=(*SIGNALS, *WIRE), default=[*SIGNALS, *WIRE])
    add("--requests", type=int, default=2000, help="of each model, over all parts")
    add("--rate", type=float, default=10.0, help="requests per second on average")
    add("--distinct", type=int, default=400, help="different requests, asked in turn")
    add("--seed", type=int, default=0)
    add("--calm", type=float, default=12.0, help="undisturbed seconds before the first fault")
    add("--pause", type=float, default=3.0, help="seconds whole before the next fault")
    add("--patience", type=float, default=45.0, help="seconds within which a fault must be healed")
    add("--stages", type=int, default=2)
    add("--expert-shards", type=int, default=4)
    add("--expert-replicas", type=int, default=2)
    add("--dispatch", choices=("actor", "direct"), default="actor")
    add("--cluster", choices=("none", "ray"), default="none", help="subprocesses or Ray actors")
    add("--nodes", type=int, default=1, help="simulated nodes of the Ray cluster")
    add("--remove-node", action="store_true", help="only lose nodes: the same as --parts nodes")
    add("--wire", choices=("unix", "tcp"), default="unix", help="sockets of the harmed connections")
    add("--rounds", type=int, default=3, help="of dead-shard: throughput whole, then without one")
    add("--round-seconds", type=float, default=5.0)
    add("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.remove_node:
        options.parts = ["nodes"]
    if "nodes" in options.parts and (options.cluster != "ray" or options.nodes < 3):
        parser.error("losing nodes needs --cluster ray --nodes 3 or more")
    return options


def main() -> int:
    """Run every part on every model; 1 when anything was not as it must be."""
    options = parse()
    logging.basicConfig(level="WARNING", format="%(name)s: %(message)s")
    log.setLevel(logging.INFO)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, {platform.processor()}, load {load:.1f}, seed {options.seed}")
    results: list[dict[str, Any]] = []
    clean = True
    for model in options.model:
        run = Run(options, model)
        for part in options.parts:
            if part == "dead-shard":
                shard = run.dead_shard()
                clean &= shard.loss <= shard.allowed
                print(f"{model}, {shard}", flush=True)
                results.append({"name": f"{model}, {part}", **shard.as_json()})
                continue
            account = run.part(part)
            clean &= account.is_clean
            print(table(account), flush=True)
            results.append(as_json(account))
    if options.json:
        command = " ".join(["python -m benchmarks.chaos", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, "runs": results}, indent=1))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
