"""One token stream as the engine sees it: what is known, what is computed, what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from router.prefix_keys import PrefixKeys
from router.step import (
    LAST_SAMPLED,
    NOTHING,
    Admit,
    FinishReason,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    Want,
)

MAX_OVERTAKES = 16
"""How often later arrivals may go first, or take its place, before a sequence outranks them all."""


class SequenceStatus(StrEnum):
    """WAITING holds nothing; RUNNING holds blocks (and a slot) and is known to the stages."""

    WAITING = "waiting"
    RUNNING = "running"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of one sequence.

    `tokens` is prompt + emitted. Positions below `num_computed` are in the cache; the last
    known token never is before the step that samples the next one. `max_length` bounds
    `len(tokens)`. `arrival` counts admissions, `last_step` is the last step it was part of, and
    `overtaken` counts later arrivals that started before it or took its place.

    `num_in_flight` steps hold a row of it: they compute `num_ahead` tokens and sample
    `num_coming`. It has `ended` when its last token is out, or its client gone, before them.

    `keys` name its full blocks, of which `num_published` can be found by others, if it `publishes`
    at all. It last started with `start_length` known tokens; when it first started, `num_hit` were
    in the cache. `num_dropped` blocks lie behind its window. `marks` are positions where its
    recurrent state is worth a snapshot; `rolling` is its latest one behind the prefill.
    """

    seq_id: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    max_length: int
    priority: int
    arrival: int
    want: Want = NOTHING
    cache_salt: str = ""
    keys: PrefixKeys | None = None
    num_published: int = 0
    publishes: bool = True
    num_hit: int | None = None
    num_dropped: int = 0
    start_length: int = 0
    marks: set[int] = field(default_factory=set)
    rolling: bytes | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0
    slot: int = -1
    num_in_flight: int = 0
    num_ahead: int = 0
    num_coming: int = 0
    ended: bool = False
    last_step: int = -1
    overtaken: int = 0

    @classmethod
    def from_admit(cls, admit: Admit, *, max_model_len: int, arrival: int) -> Sequence:
        """A waiting sequence whose `max_tokens` is cut so that it ends within `max_model_len`."""
        num_prompt = len(admit.prompt)
        max_tokens = min(admit.sampling.max_tokens, max_model_len - num_prompt)
        return cls(
            seq_id=admit.seq_id,
            tokens=[*admit.prompt, *admit.emitted],
            num_prompt=num_prompt,
            sampling=replace(admit.sampling, max_tokens=max_tokens),
            max_length=num_prompt + max_tokens,
            priority=admit.priority,
            arrival=arrival,
            want=admit.want,
            cache_salt=admit.cache_salt,
            # Where nothing is sampled nobody sees whether the numbers are finite.
            publishes=max_tokens > 0,
        )

    @property
    def length(self) -> int:
        """Known tokens: prompt + emitted."""
        return len(self.tokens)

    @property
    def num_emitted(self) -> int:
        """Tokens sampled so far, those before a resume included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_planned(self) -> int:
        """Tokens in the cache once every step in flight has run."""
        return self.num_computed + self.num_ahead

    @property
    def planned_length(self) -> int:
        """Known tokens once every step in flight has run."""
        return len(self.tokens) + self.num_coming

    @property
    def num_pending(self) -> int:
        """Tokens that no step computes yet; 1 for a sequence that decodes."""
        return self.planned_length - self.num_planned

    @property
    def decodes(self) -> bool:
        """Whether its next step, or else each in flight, computes a single token."""
        return self.num_ahead == self.num_in_flight if self.num_in_flight else self.num_pending == 1

    @property
    def continues(self) -> bool:
        """Whether tokens are sampled at all; otherwise it ends when its prompt is computed."""
        return self.sampling.max_tokens > 0

    @property
    def tier(self) -> tuple[bool, int]:
        """Lower may take resources from higher; the often overtaken are above all priorities, and
        equal among themselves."""
        return self.rank[:2]

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Total order of who goes first: tier, then arrival."""
        aged = self.overtaken >= MAX_OVERTAKES
        return (not aged, 0 if aged else self.priority, self.arrival)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the sequence has ended with its last emitted token; None while it goes on."""
        length, sampling = len(self.tokens), self.sampling
        num_emitted = length - self.num_prompt
        if not num_emitted:
            return None
        if num_emitted >= sampling.min_tokens and self.tokens[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= self.max_length else None

    def introduction(self) -> NewSequence:
        """What the stages must know before its first step here."""
        return NewSequence(
            seq_id=self.seq_id,
            prompt=tuple(self.tokens[: self.num_prompt]),
            emitted=tuple(self.tokens[self.num_prompt :]),
            sampling=self.sampling,
            state_slot=self.slot,
            want=self.want,
        )

    def next_chunk(self, num_tokens: int) -> ScheduledSequence:
        """The plan's row for its next `num_tokens` pending tokens; new blocks go out once."""
        start, length = self.num_planned, self.planned_length
        end = start + num_tokens
        new_blocks = tuple(self.blocks[self.num_sent_blocks :])
        self.num_sent_blocks = len(self.blocks)
        samples = end == length and self.continues
        self.num_ahead += num_tokens
        self.num_coming += samples
        token_ids = self.tokens[start:end]
        return ScheduledSequence(
            seq_id=self.seq_id,
            start=start,
            num_tokens=num_tokens,
            token_ids=(*token_ids, *[LAST_SAMPLED] * (num_tokens - len(token_ids))),
            length=length,
            new_blocks=new_blocks,
            samples=samples,
        )

    def landed(self, row: ScheduledSequence) -> None:
        """A step in flight has returned."""
        self.num_in_flight -= 1
        self.num_ahead -= row.num_tokens
        self.num_coming -= row.samples
