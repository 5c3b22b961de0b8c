"""Who has stopped: judged by the signs of life that workers give, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from router.layer_totals import LayerTotals
from shards.spec import Deadlines

BEATS_PER_DEADLINE = 3
_PAUSES_PER_DEADLINE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Worker to ingress: turns of its data loop so far, and what it has counted.

    A loop that waits for events is turned by its worker's own pulse, long before the step deadline.
    """

    turns: int
    layers: dict[int, LayerTotals] = field(default_factory=dict)
    """Of the MoE exchanges that the worker itself dispatches."""


@dataclass(slots=True)
class _Seen:
    """When something was last heard of a worker, and when its data loop last got on."""

    heard: float
    moved: float
    turns: int = -1


class PulseJudge:
    """Times in, verdicts out. Time counts only while the caller looks.

    A pause of the caller, or of its whole machine, is cut to a tenth of the hang deadline: who did
    not look has not seen anybody be silent.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self._hang_s = deadlines.hang_s
        self._step_s = deadlines.step_s
        self._longest_s = deadlines.hang_s / _PAUSES_PER_DEADLINE
        self._clock = 0.0
        self._looked: float | None = None
        self._seen: dict[str, _Seen] = {}

    def watch(self, peer: str, now: float) -> None:
        """Judge this worker from now on; a successor takes its predecessor's place."""
        self._advance(now)
        self._seen[peer] = _Seen(heard=self._clock, moved=self._clock)

    def forget(self, peer: str) -> None:
        """Judge it no more."""
        self._seen.pop(peer, None)

    def on_beat(self, peer: str, beat: Beat, now: float) -> None:
        """A sign of life; of a worker that nobody watches it means nothing."""
        self._advance(now)
        seen = self._seen.get(peer)
        if seen is None:
            return
        seen.heard = self._clock
        if beat.turns != seen.turns:
            seen.moved, seen.turns = self._clock, beat.turns

    def verdicts(self, now: float, at_work: Callable[[str], bool]) -> dict[str, str]:
        """Who is to be given up, and why; each once. All beats that have come must be told before.

        Silence is forgiven to a worker that is `at_work`: it holds Python's lock in a long call, or
        gets no core. The step deadline holds for it too.
        """
        self._advance(now)
        found: dict[str, str] = {}
        for peer, seen in self._seen.items():
            silent, still = self._clock - seen.heard, self._clock - seen.moved
            if still >= self._step_s:
                found[peer] = f"hung: its data loop has not turned for {still:.1f} s"
            elif silent >= self._hang_s and not at_work(peer):
                found[peer] = f"hung: no sign of life for {silent:.2f} s"
        for peer in found:
            del self._seen[peer]
        return found

    def _advance(self, now: float) -> None:
        if self._looked is not None:
            self._clock += min(now - self._looked, self._longest_s)
        self._looked = now
