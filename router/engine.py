"""The engine's core: admits sequences, plans steps, turns results into tokens. No I/O."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Protocol

from router.limits import EngineLimits
from router.scheduler import Scheduler
from router.sequence import Sequence, SequenceStatus
from router.sequence_cache import SequenceCache
from router.step import (
    NO_TOKEN,
    NOTHING,
    Admit,
    EngineLoad,
    FinishReason,
    Refusal,
    Sampled,
    StepPlan,
    StepResult,
    Token,
    Want,
)

__all__ = ["EngineCore", "EngineLimits", "Executor"]


class Executor(Protocol):
    """Runs plans, at most `max_in_flight` at once; results come back in any order."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted before the first result is polled."""

    def submit(self, plan: StepPlan) -> None:
        """Start one step."""

    def poll(self, timeout: float | None) -> StepResult | None:
        """The next result; None when there is none within `timeout` seconds (0: now)."""


class EngineCore:
    """One model instance's sequences from Admit to their last token.

    Loop: `schedule` and submit while it returns plans, then `apply` each result. Call `reset`
    before anything of a newer epoch; whatever is left over from an older epoch is dropped.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self._start_epoch(0, SequenceCache(limits))

    def _start_epoch(self, epoch: int, cache: SequenceCache) -> None:
        self._epoch = epoch
        self._scheduler = Scheduler(self.limits, cache)
        self._sequences: dict[int, Sequence] = {}
        self._in_flight: dict[int, StepPlan] = {}
        self._next_step_id = 0
        self._num_admitted = 0

    @property
    def epoch(self) -> int:
        """The life of the group this core plans for."""
        return self._epoch

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits, runs, or is on its way out of a step in flight."""
        return bool(self._sequences)

    @property
    def num_in_flight(self) -> int:
        """Planned steps whose result has not been applied."""
        return len(self._in_flight)

    def reset(self, epoch: int, *, keep_cache: bool = False) -> None:
        """Forget every sequence and step; the stages must have forgotten them too.

        With `keep_cache` their memory is as it was: what applied steps have published is found
        again. Raises ValueError for an epoch that is over, or the current one while it has work.
        """
        if epoch < self._epoch or (epoch == self._epoch and self.has_work):
            raise ValueError(f"epoch {epoch}: the engine is already in epoch {self._epoch}")
        cache = SequenceCache(self.limits)
        if keep_cache:
            cache = self._scheduler.cache
            lost = (op for plan in self._in_flight.values() for op in plan.state_ops)
            cache.forget_all(self._scheduler.running.values(), lost)
        self._start_epoch(epoch, cache)

    def admit(self, admit: Admit) -> Refusal | None:
        """Queue a sequence, or say why it can never be served here.

        `max_tokens` is cut to what `max_model_len` leaves. An Admit of an older epoch is dropped
        without a refusal: the journal has admitted the sequence again under the newer one.
        Raises ValueError for a newer epoch, a known `seq_id`, or a sequence already at its end.
        """
        if admit.epoch < self._epoch:
            return None
        if admit.epoch > self._epoch:
            raise ValueError(f"epoch {admit.epoch} was not announced: this is {self._epoch}")
        if admit.seq_id in self._sequences:
            raise ValueError(f"sequence {admit.seq_id} is already admitted")
        reason = refusal_reason(admit, self.limits)
        if reason is not None:
            return Refusal(seq_id=admit.seq_id, reason=reason)
        seq = Sequence.from_admit(
            admit, max_model_len=self.limits.max_model_len, arrival=self._num_admitted
        )
        if seq.finish_reason is not None or (seq.continues and seq.length >= seq.max_length):
            raise ValueError(
                f"sequence {admit.seq_id} has already finished: {seq.num_emitted} tokens emitted, "
                f"max_tokens={seq.sampling.max_tokens}"
            )
        self._num_admitted += 1
        self._sequences[seq.seq_id] = seq
        self._scheduler.add(seq)
        return None

    def abort(self, seq_id: int) -> None:
        """End a sequence without further tokens; one that is unknown or finished is ignored.

        In flight it keeps its blocks and slot until its step returns, which still writes them.
        """
        seq = self._sequences.get(seq_id)
        if seq is None:
            return
        self._end(seq)

    def schedule(self) -> StepPlan | None:
        """The next step, or None while all that can run is in flight (or nothing is left)."""
        if self.num_in_flight >= self.limits.num_steps:
            return None
        plan = self._scheduler.schedule(
            epoch=self._epoch, step_id=self._next_step_id, num_in_flight=self.num_in_flight
        )
        if plan is not None:
            self._in_flight[plan.step_id] = plan
            self._next_step_id += 1
        return plan

    def apply(self, result: StepResult) -> tuple[Token, ...]:
        """Take a step's result and return its new tokens, in the plan's order.

        A result of an older epoch is dropped. Raises ValueError, and changes nothing, when the
        step is not in flight, is not the first in flight with lookahead, or its samples are not
        those the plan asked for.
        """
        if result.epoch < self._epoch:
            return ()
        plan = self._in_flight.get(result.step_id)
        if plan is None or result.epoch != plan.epoch:
            raise ValueError(f"step {result.step_id} of epoch {result.epoch} is not in flight")
        if self.limits.lookahead and result.step_id != min(self._in_flight):
            raise ValueError(f"step {result.step_id} came before step {min(self._in_flight)}")
        expected = [row.seq_id for row in plan.scheduled if row.samples]
        if [sampled.seq_id for sampled in result.sampled] != expected:
            raise ValueError(f"step {result.step_id} must sample sequences {expected} in order")
        del self._in_flight[result.step_id]
        samples = iter(result.sampled)
        tokens: list[Token] = []
        for row in plan.scheduled:
            sampled = next(samples) if row.samples else None
            seq = self._sequences[row.seq_id]
            seq.landed(row)
            self._scheduler.cache.computed(seq, row.num_tokens)
            if seq.ended:
                self._end(seq)
            elif sampled is not None:
                tokens.append(self._emit(seq, sampled))
            elif not seq.continues and seq.num_computed == seq.length:
                tokens.append(self._close(seq, FinishReason.LENGTH))
        return tuple(tokens)

    def _emit(self, seq: Sequence, sampled: Sampled) -> Token:
        if sampled.token_id == NO_TOKEN:
            if sampled.ends:
                return self._close(seq, FinishReason.STOP)
            if not sampled.error:
                self._scheduler.cache.distrust(seq)
            return self._close(seq, FinishReason.ERROR, sampled.error)
        seq.tokens.append(sampled.token_id)
        finish = FinishReason.STOP if sampled.ends else seq.finish_reason
        if finish is not None:
            self._end(seq)
        elif seq.length - 1 == self.limits.reprefill_length:
            # Known length grows one by one, so this is the crossing: all that is cached was
            # computed at a length up to the limit, and may be shared by sequences below it.
            self._scheduler.restart(seq)
        return Token(
            seq_id=seq.seq_id,
            position=seq.num_emitted - 1,
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish=finish,
            num_cached=seq.num_hit or 0 if seq.num_emitted == 1 else 0,
        )

    def _close(self, seq: Sequence, finish: FinishReason, error: str = "") -> Token:
        """The end of a sequence without a further token."""
        self._end(seq)
        return Token(
            seq_id=seq.seq_id,
            position=seq.num_emitted,
            token_id=NO_TOKEN,
            finish=finish,
            error=error,
            num_cached=0 if seq.num_emitted else seq.num_hit or 0,
        )

    def _end(self, seq: Sequence) -> None:
        """Nothing more of it is wanted; it goes when the steps that still write it are back."""
        seq.ended = True
        if seq.num_in_flight:
            return
        del self._sequences[seq.seq_id]
        self._scheduler.remove(seq)

    def load(self) -> EngineLoad:
        """What is held right now; preemptions count from the start of the epoch."""
        scheduler, cache = self._scheduler, self._scheduler.cache
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=cache.blocks.num_used,
            total_blocks=cache.blocks.num_blocks,
            used_slots=cache.slots.num_used,
            total_slots=cache.slots.num_slots,
            used_snapshots=cache.snapshots.num_used,
            total_snapshots=cache.snapshots.num_slots,
            preemptions=scheduler.num_preemptions,
            prefix_tokens=scheduler.num_started_tokens,
            prefix_hit_tokens=scheduler.num_hit_tokens,
        )

    def check_invariants(self) -> None:
        """Every sequence is in one queue, and in exactly one step if it is in flight."""
        scheduler = self._scheduler
        scheduler.check_invariants()
        queued = [*scheduler.running.values(), *scheduler.waiting]
        assert len(queued) == len(self._sequences)
        assert all(self._sequences[seq.seq_id] is seq for seq in queued)
        flying = [row.seq_id for plan in self._in_flight.values() for row in plan.scheduled]
        assert Counter(flying) == {s.seq_id: s.num_in_flight for s in queued if s.num_in_flight}
        assert len(self._in_flight) <= self.limits.num_steps
        for seq in queued:
            assert seq.num_in_flight or not seq.ended, "an ended sequence was not removed"
            assert seq.ended or seq.finish_reason is None, "a finished sequence goes on"
            assert seq.status is SequenceStatus.RUNNING or not seq.num_in_flight


def refusal_reason(admit: Admit, limits: EngineLimits) -> str | None:
    """Why a sequence can never be served under `limits`; None when it can."""
    num_prompt, max_tokens = len(admit.prompt), admit.sampling.max_tokens
    if max_tokens < 0:
        return f"max_tokens={max_tokens}: allowed 0 or more"
    most = limits.max_model_len - (max_tokens > 0)
    if not 1 <= num_prompt <= most:
        return (
            f"the prompt has {num_prompt} tokens: allowed 1..{most} "
            f"with max_model_len={limits.max_model_len}"
        )
    # The last sampled token is never computed, so it needs no place in the cache.
    num_cached = min(num_prompt + max(0, max_tokens - 1), limits.max_model_len - (max_tokens > 0))
    capacity = limits.num_blocks * limits.block_size
    if num_cached > capacity:
        return (
            f"{num_prompt} prompt tokens and max_tokens={max_tokens} need room for {num_cached} "
            f"tokens in the KV cache, which holds {capacity}"
        )
    return _unservable_want(admit.want, num_prompt, max_tokens)


def _unservable_want(want: Want, num_prompt: int, max_tokens: int) -> str | None:
    for name in ("logits", "hidden_states", "router_logits", "score_position"):
        value = getattr(want, name)
        if value is not getattr(NOTHING, name) and max_tokens > 0:
            return f"want.{name}={value} with max_tokens={max_tokens}: allowed max_tokens 0"
    positions = want.logits_positions
    scored = () if want.score_position is None else (want.score_position,)
    if any(not 0 <= p < num_prompt for p in (*positions, *scored)):
        return f"a wanted position is outside the prompt: allowed 0..{num_prompt - 1}"
    if any(a >= b for a, b in pairwise(positions)):
        return "want.logits_positions: allowed are rising positions"
    return None
