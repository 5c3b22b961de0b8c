"""What steps have taken, said only of those with a sequence whose request is traced."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """The exchanges of one MoE layer with its experts, in one step of one stage."""

    layer: int
    exchanges: int
    seconds: float
    """From handing the rows over to having the answer, summed: micro-batches overlap."""
    num_bytes: int
    """Of the rows that the experts were given and gave back, those of resends not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTrace:
    """One stage's part of a step."""

    stage: int
    seconds: float
    """From taking the plan to passing it on."""
    exchange_seconds: float
    """Of these, while at least one exchange was under way."""
    layers: tuple[LayerTrace, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRow:
    """A traced sequence's part of a step."""

    seq_id: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """Engine to ingress: a step that has come back, with the traced ones of its sequences.

    Times are seconds before it was sent, so that no two clocks are ever compared.
    """

    began_ago: float
    ended_ago: float
    num_sequences: int
    num_tokens: int
    rows: tuple[TracedRow, ...]
    stages: tuple[StageTrace, ...] = ()
    """None where the model is in the engine's own process."""
