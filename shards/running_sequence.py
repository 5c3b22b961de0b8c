"""What a stage knows of a sequence from its first step to its last."""

from __future__ import annotations

from dataclasses import dataclass

from router.step import NOTHING, NewSequence, Sampled, SamplingParams, Want
from shards.grammar import Constraint, Grammars
from shards.logits_processors import TokenHistory


@dataclass(slots=True)
class RunningSequence:
    """Its tokens, how it samples, and where its caches lie."""

    history: TokenHistory
    sampling: SamplingParams
    want: Want
    state_slot: int
    blocks: list[int]
    constraint: Constraint | None = None

    @classmethod
    def begin(cls, new: NewSequence, grammars: Grammars | None) -> RunningSequence:
        """As a plan announces it, without blocks; `grammars` is None where nothing is sampled."""
        constraint = None
        if grammars is not None and new.grammar is not None:
            constraint = grammars.begin(new.grammar, new.emitted)
        return cls(
            history=TokenHistory(new.prompt, new.emitted),
            want=new.want,
            sampling=new.sampling,
            state_slot=new.state_slot,
            blocks=[],
            constraint=constraint,
        )

    def take(self, sampled: Sampled) -> Sampled:
        """One more token was sampled; as it goes out."""
        self.history.append(sampled.token_id)
        return sampled if self.constraint is None else self.constraint.take(sampled)

    @property
    def wanted(self) -> Want:
        """Arrays describe the prompt: once a token was sampled, nothing of them is missing."""
        return NOTHING if self.history.emitted else self.want
