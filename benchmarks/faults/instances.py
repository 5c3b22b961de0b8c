"""A model instance to be harmed: subprocesses of the harness, or actors of a cluster of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.faults.launcher import ChaosLauncher
from benchmarks.faults.requests import Request
from benchmarks.faults.wire import Wire
from deploy.config import parse_args
from deploy.resolve import resolve
from router.transport.sockets import SocketTransport
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.spec import GroupSpec
from shards.subprocess_launcher import SubprocessLauncher
from tests.groups import Answer, ask, running_group

START_TIMEOUT_S = 120.0
Options = Mapping[str, Any]
"""The command line's option names with underscores."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A started group and the launcher that stands between it and its workers."""

    group: ModelGroup
    launcher: ChaosLauncher


def group_spec(options: Options) -> GroupSpec:
    """The description of the instance that these options ask for."""
    return resolve(parse_args({"dtype": "float32", "max_model_len": 512, **options})).spec


@contextmanager
def subprocess_instance(options: Options, wire: Wire | None = None) -> Iterator[Instance]:
    """Workers as subprocesses, reached through `wire` if there is one."""
    spec = group_spec(options)
    launcher = ChaosLauncher(SubprocessLauncher({"OMP_NUM_THREADS": "1"}), wire)
    group = ModelGroup(spec, launcher, SocketTransport(INGRESS, spec.secret))
    group.start(timeout=START_TIMEOUT_S)
    try:
        yield Instance(group, launcher)
    finally:
        group.stop()


def undisturbed_answers(model: str, requests: Sequence[Request]) -> list[Answer]:
    """What one process with the whole model answers: what every stream must be."""
    options: dict[str, Any] = {"executor": "local", "max_model_len": 512}

    async def answers() -> list[Answer]:
        asked = (ask(group, request.prompt, request.sampling) for request in requests)
        return list(await asyncio.gather(*asked))

    with running_group(model, processes=True, **options) as group:
        return asyncio.run(answers())
