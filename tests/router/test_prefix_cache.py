"""Shared beginnings: what is computed once, what is found again, what gives way first."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from random import Random
from typing import Any

import pytest

from router.engine import EngineCore
from router.limits import EngineLimits
from router.step import (
    NO_TOKEN,
    Admit,
    FinishReason,
    Sampled,
    SamplingParams,
    StateOpKind,
    StepPlan,
    StepResult,
    Token,
    Want,
)

LIMITS = EngineLimits(
    block_size=16,
    num_blocks=4096,
    num_state_slots=0,
    max_num_seqs=32,
    max_num_batched_tokens=512,
    max_model_len=8192,
    prefix_caching=True,
)
RECURRENT = {"num_state_slots": 32, "num_snapshots": 64}
BOTH = pytest.mark.parametrize("limits", [{}, RECURRENT], ids=["attention", "recurrent"])


class Server:
    """Runs sequences to their end on a core; tokens are a function of the length alone."""

    def __init__(self, **limits: int) -> None:
        self.core = EngineCore(replace(LIMITS, **limits))
        self.num_sequences = 0
        self.epoch = 0
        self.plans: list[StepPlan] = []

    def admit(self, prompt: list[int], max_tokens: int, **fields: Any) -> int:
        self.num_sequences += 1
        admit = Admit(
            seq_id=self.num_sequences,
            epoch=self.epoch,
            prompt=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens),
            **fields,
        )
        assert self.core.admit(admit) is None
        return self.num_sequences

    def run(self) -> dict[int, list[int]]:
        """What every sequence emits from here to the end of all."""
        emitted: dict[int, list[int]] = {}
        while self.core.has_work:
            for token in self.step():
                emitted.setdefault(token.seq_id, []).append(token.token_id)
        return emitted

    def first(self, prompt: list[int], max_tokens: int) -> Token:
        """What one sequence hears first."""
        self.admit(prompt, max_tokens)
        tokens: tuple[Token, ...] = ()
        while self.core.has_work:
            tokens += self.step()
        return tokens[0]

    def step(self, token_id: int | None = None) -> tuple[Token, ...]:
        """One step and its tokens."""
        plan = self.core.schedule()
        assert plan is not None
        self.plans.append(plan)
        sampled = tuple(
            Sampled(
                seq_id=row.seq_id,
                token_id=row.length % 97 if token_id is None else token_id,
            )
            for row in plan.scheduled
            if row.samples
        )
        tokens = self.core.apply(
            StepResult(epoch=self.epoch, step_id=plan.step_id, sampled=sampled)
        )
        self.core.check_invariants()
        return tokens

    def cost(self, prompt: list[int], **fields: Any) -> int:
        """Tokens that are computed for one sequence of one answer token."""
        seq_id = self.admit(prompt, max_tokens=1, **fields)
        self.run()
        return self.computed(seq_id)

    def computed(self, seq_id: int) -> int:
        """Tokens of a sequence that steps have computed."""
        rows = (row for plan in self.plans for row in plan.scheduled if row.seq_id == seq_id)
        return sum(row.num_tokens for row in rows)


def common(a: list[int], b: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


@BOTH
def test_conversations_find_nearly_all_that_is_there(limits: dict[str, int]) -> None:
    rng, server = Random(4), Server(**limits)
    system = [rng.randrange(1000) for _ in range(200)]
    talks = [list(system) for _ in range(16)]
    # What an oracle finds: the longest beginning that any earlier sequence has.
    past: list[list[int]] = []
    possible = 0
    for _ in range(8):
        turn: dict[int, int] = {}
        for number, talk in enumerate(talks):
            talk += [rng.randrange(1000) for _ in range(rng.randrange(5, 120))]
            turn[server.admit(talk, max_tokens=rng.randrange(5, 80))] = number
            possible += max((common(talk, known) for known in past), default=0)
            past.append(list(talk))
        for seq_id, tokens in server.run().items():
            talks[turn[seq_id]] += tokens
            past.append(list(talks[turn[seq_id]]))
    load = server.core.load()
    assert load.prefix_hit_tokens >= 0.95 * possible
    assert (load.used_blocks, load.used_slots) == (0, 0)


@BOTH
def test_many_answers_to_one_prompt_compute_it_once(limits: dict[str, int]) -> None:
    server = Server(**limits)
    ids = [server.admit(list(range(1500)), max_tokens=4) for _ in range(8)]
    server.run()
    assert server.computed(ids[0]) == 1503
    # 1500 tokens fill 93 blocks; what is behind them is everybody's own.
    assert [server.computed(seq_id) for seq_id in ids[1:]] == [1500 - 93 * 16 + 3] * 7


@BOTH
def test_the_last_token_is_always_computed(limits: dict[str, int]) -> None:
    server = Server(**limits)
    assert server.cost(list(range(64))) == 64
    assert server.cost(list(range(64))) == 16


def test_a_recurrent_sequence_needs_the_state_where_it_parts() -> None:
    server = Server(**RECURRENT)
    server.cost(list(range(100)))
    # Nothing was kept at 80, so it is computed, and kept for the third.
    assert server.cost([*range(80), *[999] * 20]) == 100
    assert server.cost([*range(80), *[777] * 20]) == 20


@pytest.mark.parametrize(
    "other",
    [{"cache_salt": "mine"}, {"want": Want(prompt_logprobs=1)}],
    ids=["another salt", "wants every position"],
)
def test_who_shares_nothing(other: dict[str, Any]) -> None:
    server = Server()
    server.cost(list(range(200)))
    assert server.cost(list(range(200)), **other) == 200


def test_a_long_context_never_shares_with_a_short_one() -> None:
    server = Server(reprefill_length=150)
    server.cost(list(range(150)))
    assert server.cost(list(range(151))) == 151
    assert server.cost(list(range(152))) == 152 - 144
    assert server.cost(list(range(149))) == 149 - 144


def test_the_least_recently_used_content_goes_first() -> None:
    server = Server(num_blocks=12, max_model_len=160)
    first, second, third, fourth = ([n] * 64 for n in range(4))
    for prompt in (first, second, first, third, fourth):  # the last takes what `second` left
        server.cost(prompt)
    assert server.cost(first) == 16
    assert server.cost(second) == 64


def test_snapshots_give_way_too() -> None:
    server = Server(num_state_slots=4, num_snapshots=2)
    prompts = [[n] * 64 for n in range(3)]
    for prompt in prompts:
        server.cost(prompt)
    assert server.cost(prompts[2]) == 16
    assert server.cost(prompts[0]) == 64
    assert server.core.load().used_snapshots == 2


@BOTH
def test_what_was_cached_outlives_an_epoch_if_the_stages_do(limits: dict[str, int]) -> None:
    prompt = list(range(200))
    for keep_cache, cost in ((True, 200 - 192), (False, 200)):
        server = Server(**limits)
        server.cost(prompt)
        server.admit([*prompt[:100], *range(900, 1000)], max_tokens=9)
        server.step()  # a sequence is alive, and a step is in flight that never returns
        assert server.core.schedule() is not None
        server.core.reset(1, keep_cache=keep_cache)
        server.core.check_invariants()
        load = server.core.load()
        assert (load.used_blocks, load.used_slots, load.running) == (0, 0, 0)
        server.epoch = 1
        assert server.cost(prompt) == cost


def test_a_snapshot_that_may_never_have_been_taken_is_forgotten() -> None:
    prompt = list(range(40))
    server = Server(**RECURRENT)
    server.admit(prompt, max_tokens=4)
    server.step()  # up to the mark at 32: its snapshot goes out with the next plan
    plan = server.core.schedule()
    assert plan is not None
    assert [op.kind for op in plan.state_ops] == [StateOpKind.SNAPSHOT]
    server.core.reset(1, keep_cache=True)
    server.epoch = 1
    assert server.core.load().used_snapshots == 0
    assert server.cost(prompt) == 40


@BOTH
def test_what_is_not_finite_is_found_by_nobody(limits: dict[str, int]) -> None:
    """Neither what ended with an error, nor what nobody has seen a token of."""
    prompt = list(range(200))
    server = Server(**limits)
    seq_id = server.admit(prompt, max_tokens=4)
    while not (tokens := server.step(token_id=NO_TOKEN)):
        pass
    assert [token.finish for token in tokens] == [FinishReason.ERROR]
    assert server.cost(prompt) == 200
    server = Server(**limits)
    server.admit(prompt, max_tokens=0)
    server.run()
    assert server.cost(prompt) == 200
    assert server.cost(prompt) == 200 - 192
    assert server.computed(seq_id) == 200


def test_the_tokens_that_were_cached_are_those_of_the_first_start() -> None:
    server = Server(num_blocks=4)
    assert server.first([*range(32)], max_tokens=1).num_cached == 0
    assert server.first([*range(32), 7], max_tokens=1).num_cached == 32
    assert server.first([*range(32), 7], max_tokens=0).num_cached == 32
