"""What one engine may use at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the scheduler may use. `num_state_slots` is 0 without recurrent layers.

    Above `reprefill_length` known tokens a sequence's cache has another content (LongRoPE).
    With `prefix_caching` sequences share the blocks of a common beginning; `num_snapshots` more
    state slots, numbered behind the others, hold what recurrent models need for it. `max_in_flight`
    is one step per stage; with `lookahead` (one stage) the next step is planned and sent while one
    runs.
    """

    block_size: int
    num_blocks: int
    num_state_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    reprefill_length: int | None = None
    max_in_flight: int = 1
    lookahead: bool = False
    prefix_caching: bool = False
    num_snapshots: int = 0
    window: int | None = None
    """Sliding window: a token reads this many keys, its own included; None reads all."""
    few_tokens: int | None = None
    """With expert actors: so many tokens take them hardly longer than fewer do, for it is their
    weights that take time. Decoding sequences up to this many take their steps together instead of
    filling the pipeline, and a step up to it is one micro-batch. None: there are none."""

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_in_flight"):
            _require(name, getattr(self, name), 1)
        _require("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _require("max_model_len", self.max_model_len, 2)
        _require("num_state_slots", self.num_state_slots, 0)
        _require("num_snapshots", self.num_snapshots, 0)
        if self.lookahead and self.max_in_flight != 1:
            raise ValueError(f"lookahead with max_in_flight={self.max_in_flight}: allowed 1")
        if self.window is not None:
            _require("window", self.window, 1)
        if self.few_tokens is not None:
            _require("few_tokens", self.few_tokens, 0)
        if self.reprefill_length is not None:
            _require("reprefill_length", self.reprefill_length, 1)

    @property
    def num_steps(self) -> int:
        """Steps that may be planned before the first one's result is there."""
        return self.max_in_flight + self.lookahead

    @property
    def num_state_rows(self) -> int:
        """Recurrent states that a stage remembers: those of running sequences, and snapshots."""
        return self.num_state_slots + (self.num_snapshots if self.num_state_slots else 0)

    @property
    def num_seats(self) -> int:
        """Sequences that may run at once: no more than the budgets of all steps have tokens."""
        seats = min(self.max_num_seqs, self.max_num_batched_tokens * self.max_in_flight)
        return min(seats, self.num_state_slots) if self.num_state_slots else seats


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value}: allowed {least} or more")
