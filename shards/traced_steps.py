"""The engine's notes on steps with traced sequences: when each began and came back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from router.step import Admit, StepPlan, StepResult
from router.step_trace import StepTrace, TracedRow


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flying:
    began: float
    num_sequences: int
    num_tokens: int
    rows: tuple[TracedRow, ...]


class TracedSteps:
    """I/O-free; times are the caller's monotonic clock. False while no sequence is traced."""

    def __init__(self) -> None:
        self._sequences: set[int] = set()
        self._flying: dict[int, _Flying] = {}
        self._back: list[tuple[float, _Flying, StepResult]] = []

    def __bool__(self) -> bool:
        return bool(self._sequences or self._flying or self._back)

    def admit(self, admit: Admit) -> None:
        """A sequence has been admitted, perhaps one that is traced."""
        if admit.traced:
            self._sequences.add(admit.seq_id)

    def end(self, seq_id: int) -> None:
        """A sequence has ended, for whatever reason."""
        self._sequences.discard(seq_id)

    def reset(self) -> None:
        """The epoch is over."""
        self._sequences.clear()
        self._flying.clear()
        self._back.clear()

    def begin(self, plan: StepPlan, now: float) -> StepPlan:
        """A step is about to be submitted: as it goes out."""
        rows = tuple(
            TracedRow(seq_id=row.seq_id, num_tokens=row.num_tokens, samples=row.samples)
            for row in plan.scheduled
            if row.seq_id in self._sequences
        )
        if not rows:
            return plan
        self._flying[plan.step_id] = _Flying(
            began=now,
            num_sequences=len(plan.scheduled),
            num_tokens=sum(row.num_tokens for row in plan.scheduled),
            rows=rows,
        )
        return replace(plan, trace=())

    def come_back(self, result: StepResult, now: float) -> None:
        """A step of this epoch has come back."""
        flying = self._flying.pop(result.step_id, None)
        if flying is not None:
            self._back.append((now, flying, result))

    def take(self, now: float) -> tuple[StepTrace, ...]:
        """What has come back since the last time, to be sent now."""
        back, self._back = self._back, []
        return tuple(
            StepTrace(
                began_ago=now - flying.began,
                ended_ago=now - ended,
                num_sequences=flying.num_sequences,
                num_tokens=flying.num_tokens,
                rows=flying.rows,
                stages=result.trace,
            )
            for ended, flying, result in back
        )
