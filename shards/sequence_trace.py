"""What the ingress has seen of one traced sequence, added up so that it stays small."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.step_trace import LayerTrace, StageTrace, StepTrace, TracedRow

MAX_EVENTS = 16
"""The first steps of each phase, and the first restarts, are kept one by one."""


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step's report on its way to a sequence of it; `heard` on the ingress's monotonic clock."""

    step: StepTrace
    row: TracedRow
    heard: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNote:
    """One step: when it began and ended, its tokens of this sequence and of all."""

    began: float
    ended: float
    tokens: int
    batch_tokens: int
    batch_sequences: int


@dataclass(slots=True, kw_only=True)
class LayerSum:
    """The exchanges of one MoE layer in all steps of a phase."""

    exchanges: int = 0
    seconds: float = 0.0
    num_bytes: int = 0

    def add(self, layer: LayerTrace) -> None:
        """Those of one more step."""
        self.exchanges += layer.exchanges
        self.seconds += layer.seconds
        self.num_bytes += layer.num_bytes


@dataclass(slots=True, kw_only=True)
class Phase:
    """The prefill of a sequence, or its decoding: steps added up."""

    began: float
    ended: float
    steps: int = 0
    tokens: int = 0
    batch_tokens: int = 0
    slowest_s: float = 0.0
    stage_s: dict[int, float] = field(default_factory=dict)
    exchange_s: float = 0.0
    """While an exchange was under way; never more than the phase has lasted."""
    layers: dict[int, LayerSum] = field(default_factory=dict)
    notes: list[StepNote] = field(default_factory=list)

    def add(self, note: StepNote, stages: tuple[StageTrace, ...]) -> None:
        """One more step."""
        self.ended = max(self.ended, note.ended)
        self.steps += 1
        self.tokens += note.tokens
        self.batch_tokens += note.batch_tokens
        self.slowest_s = max(self.slowest_s, note.ended - note.began)
        if len(self.notes) < MAX_EVENTS:
            self.notes.append(note)
        for stage in stages:
            self.stage_s[stage.stage] = self.stage_s.get(stage.stage, 0.0) + stage.seconds
            self.exchange_s += stage.exchange_seconds
            for layer in stage.layers:
                self.layers.setdefault(layer.layer, LayerSum()).add(layer)
        self.exchange_s = min(self.exchange_s, self.ended - self.began)


class SequenceTrace:
    """I/O-free; all times on the ingress's monotonic clock. Written where its tokens are read."""

    def __init__(self, num_prompt: int, made: float) -> None:
        self.num_prompt = num_prompt
        self.made = made
        self.begun: float | None = None
        """When it was said to be in a step, for the first time."""
        self.prefill: Phase | None = None
        """Until the first token is sampled, or the prompt computed."""
        self.decode: Phase | None = None
        self.num_restarts = 0
        """How often it had to begin again: it gave way, or a worker died."""
        self.restarts: list[float] = []
        self._sampled = False

    def begin(self, now: float) -> None:
        """It is in a step in flight, for the first time or again."""
        if self.begun is None:
            self.begun = now
            return
        self.num_restarts += 1
        if len(self.restarts) < MAX_EVENTS:
            self.restarts.append(now)

    def see(self, seen: TracedStep) -> None:
        """A step has come back."""
        step, row = seen.step, seen.row
        began, ended = seen.heard - step.began_ago, seen.heard - step.ended_ago
        phase = self._phase(began)
        note = StepNote(
            # It may have begun before the one in front of it had come back.
            began=max(phase.began, began),
            ended=max(phase.began, ended),
            tokens=row.num_tokens,
            batch_tokens=step.num_tokens,
            batch_sequences=step.num_sequences,
        )
        phase.add(note, step.stages)
        self._sampled = self._sampled or row.samples

    def _phase(self, began: float) -> Phase:
        """The one that a step belongs to which began then."""
        if self.prefill is None:
            # A late message must not make it begin before there was a request.
            began = max(self.made, began)
            self.prefill = Phase(began=began, ended=began)
        if not self._sampled:
            return self.prefill
        if self.decode is None:
            self.decode = Phase(began=self.prefill.ended, ended=self.prefill.ended)
        return self.decode
