"""What the ingress sees of a model instance: token streams in, state and actor map out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router.step import NOTHING, EngineLoad, SamplingParams, Token, Want


class GroupState(StrEnum):
    """`recovering` still accepts requests: they start when the group has healed."""

    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


class SequenceRefused(ValueError):
    """The engine can never serve this sequence; the message says why."""


class SequenceFailed(RuntimeError):
    """The sequence cannot go on, through no fault of the caller; others are not affected."""


class GroupFailed(RuntimeError):
    """The supervisor has given up on this model instance; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as `/v1/experts` shows it; `experts` is empty but for expert workers."""

    role: str
    index: int
    pid: int
    node_id: str
    state: str
    incarnation: int = 0
    experts: tuple[int, ...] = ()
    layers: tuple[int, int] | None = None


class TokenStream(Protocol):
    """Tokens of one sequence in order, exactly once, whatever dies behind it."""

    def __aiter__(self) -> AsyncIterator[Token]:
        """Ends after the token whose `finish` is set.

        Raises SequenceRefused, SequenceFailed or GroupFailed.
        """

    @property
    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that `want` named, by name; whole once the first token has come."""

    def abort(self) -> None:
        """Stop generating and free everything; harmless after the end. Thread-safe."""


class ModelClient(Protocol):
    """A running model instance. Call from the event loop it was made on."""

    @property
    def state(self) -> GroupState: ...

    @property
    def failure(self) -> str:
        """Why the state is `failed`; empty otherwise."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def routing_table_version(self) -> int: ...

    @property
    def cache_summary(self) -> str:
        """How much the caches hold, and what decided it."""

    def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        want: Want = NOTHING,
        cache_salt: str = "",
    ) -> TokenStream:
        """Start one sequence (journalled, so that it survives any worker's death).

        With `max_tokens` 0 it ends with NO_TOKEN as soon as its prompt is computed. Only
        sequences of the same `cache_salt` share cached prefixes.
        """

    def workers(self) -> tuple[WorkerStatus, ...]: ...

    def stop(self) -> None:
        """Shut every worker down and wait for them."""
