"""What a stage knows of a sequence from its first step to its last."""

from __future__ import annotations

from dataclasses import dataclass

from router.step import NOTHING, NewSequence, SamplingParams, Want
from shards.logits_processors import TokenHistory


@dataclass(slots=True)
class RunningSequence:
    """Its tokens, how it samples, and where its caches lie."""

    history: TokenHistory
    sampling: SamplingParams
    want: Want
    state_slot: int
    blocks: list[int]

    @classmethod
    def begin(cls, new: NewSequence) -> RunningSequence:
        """As a plan announces it, without blocks. Raises ValueError for a grammar."""
        if new.grammar is not None:
            raise ValueError(f"sequence {new.seq_id}: grammar is not served; allowed: None")
        return cls(
            history=TokenHistory(new.prompt, new.emitted),
            want=new.want,
            sampling=new.sampling,
            state_slot=new.state_slot,
            blocks=[],
        )

    @property
    def wanted(self) -> Want:
        """Arrays describe the prompt: once a token was sampled, nothing of them is missing."""
        return NOTHING if self.history.emitted else self.want
