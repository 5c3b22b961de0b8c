"""What the ingress sees of a model instance: token streams in, state and actor map out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from router.layer_totals import LayerTotals
from router.step import NOTHING, EngineLoad, SamplingParams, Token, Want
from shards.sequence_trace import SequenceTrace

if TYPE_CHECKING:  # Serve's proxy, too, imports the errors of this file
    import numpy as np
    from numpy.typing import NDArray


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


class WorkerKilled(SequenceFailed):
    """Workers died of this very sequence: it was the only one that ran when the last one did."""


class ReaderTooSlow(SequenceFailed):
    """Whoever reads the tokens is too many of them behind."""


class GroupUnavailable(RuntimeError):
    """The model instance has been healing for longer than requests wait; it goes on healing."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


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
    deaths: int = 0
    recoveries: int = 0
    """Successors of dead incarnations that have loaded."""
    last_reason: str = ""
    """Why its last incarnation died."""
    experts: tuple[int, ...] = ()
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What a model instance that heals is waiting for: the worker in question, and its record."""

    worker: str
    reason: str
    """What it died of."""
    deaths_in_a_row: int
    healing_s: float
    """For how long the instance has been healing."""
    respawn_in_s: float
    """Until that worker is started again; 0 while it is starting."""


class TokenStream(Protocol):
    """Tokens of one sequence in order, exactly once, whatever dies behind it."""

    def __aiter__(self) -> AsyncIterator[Token]:
        """Ends after the token whose `finish` is set.

        Raises SequenceRefused, SequenceFailed, GroupUnavailable or GroupFailed.
        """

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited for its first step; None while it does."""

    @property
    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The arrays that `want` named, by name; whole once the first token has come."""

    def abort(self) -> None:
        """Stop generating and free everything; harmless after the end. Thread-safe."""


class TokenSource(Protocol):
    """Where sequences are started. Call from the event loop that their tokens are read on."""

    def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        want: Want = NOTHING,
        grammar: str | None = None,
        cache_salt: str = "",
        trace: SequenceTrace | None = None,
    ) -> TokenStream:
        """Start one sequence (journalled, so that it survives any worker's death).

        With `max_tokens` 0 it ends with NO_TOKEN as soon as its prompt is computed. Only
        sequences of the same `cache_salt` share cached prefixes. `grammar` is what llguidance's
        `LLMatcher` takes: every prefix of the answer is one of a text that it accepts. `trace`
        hears of its steps.
        """


class ModelClient(TokenSource, Protocol):
    """A running model instance. Call from the event loop it was made on."""

    @property
    def state(self) -> GroupState: ...

    @property
    def failure(self) -> str:
        """Why the state is `failed`; empty otherwise."""

    @property
    def trouble(self) -> Trouble | None:
        """What keeps it from being ready; None while it is, or has no worker in question."""

    @property
    def unavailable(self) -> GroupUnavailable | None:
        """Why new sequences are refused for the time being; None when they are not."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def routing_table_version(self) -> int: ...

    @property
    def cache_summary(self) -> str:
        """How much the caches hold, and what decided it."""

    @property
    def layer_totals(self) -> dict[int, LayerTotals]:
        """What dispatching has cost, by MoE layer; empty where experts are in the engine."""

    def workers(self) -> tuple[WorkerStatus, ...]: ...

    def stop(self) -> None:
        """Shut every worker down and wait for them."""
