"""Requests that kill their workers, against a simulated engine: they fail, and nobody else does."""

from __future__ import annotations

import math
import random

import pytest

from router.step import (
    Abort,
    Admit,
    FinishReason,
    SamplingParams,
    Token,
    TokenBatch,
    Want,
    WantedRows,
)
from shards.actions import Mourn
from shards.client import WorkerKilled
from shards.journal import JournalEntry
from shards.live_sequences import LiveSequences, Messages
from shards.spec import Role, WorkerSpec
from shards.suspects import Suspects
from tests.shards.test_supervisor import group_spec

STAGE = WorkerSpec(group=group_spec(), role=Role.STAGE, index=0)


class World:
    """An engine whose steps hold arbitrary sequences, and workers that some of these kill.

    `poison` maps a sequence to the number of tokens after which computing it is fatal.
    """

    def __init__(self, seed: int, lengths: list[int], poison: dict[int, int]) -> None:
        self.rng = random.Random(seed)
        self.lengths = lengths
        self.poison = poison
        self.sequences = LiveSequences()
        self.outputs: list[list[object]] = [[] for _ in lengths]
        self.epoch = 0
        self.known: dict[int, int] = {}
        self.started: set[int] = set()
        self.deaths = 0
        self.seats = self.rng.choice([2, 4, 100])
        self.late_reports = False

    def ask(self, seq_id: int) -> None:
        sampling = SamplingParams(max_tokens=self.lengths[seq_id])
        entry = JournalEntry(seq_id, (1,), sampling, 0, self.outputs[seq_id].append)
        self.tell(self.sequences.add(entry))

    def begin(self) -> None:
        self.epoch += 1
        self.known.clear()
        self.started.clear()
        self.tell(self.sequences.begin(self.epoch))

    def tell(self, messages: Messages) -> None:
        for message in messages:
            assert message.epoch == self.epoch
            if isinstance(message, Admit):
                assert message.seq_id not in self.known
                assert len(message.emitted) < self.lengths[message.seq_id]
                self.known[message.seq_id] = len(message.emitted)
            else:
                assert isinstance(message, Abort)
                self.known.pop(message.seq_id, None)
                self.started.discard(message.seq_id)

    def report(self, epoch: int, seq_ids: set[int]) -> None:
        self.sequences.take(TokenBatch(epoch=epoch, started=tuple(seq_ids)))

    def step(self) -> None:
        """Compute some sequences: one token each, or a death before anything comes of it."""
        room = self.seats - len(self.started)
        new = set(sorted(set(self.known) - self.started)[: max(0, room)])
        self.started |= new
        late = self.late_reports and self.rng.random() < 0.3
        if not late:
            self.report(self.epoch, new)
        if not self.started:
            return
        count = self.rng.randint(1, len(self.started))
        batch = self.rng.sample(sorted(self.started), count)
        if any(self.known[s] == self.poison.get(s) for s in batch):
            self.die(self.epoch, new if late else set())
            return
        if late:
            self.report(self.epoch, new)
        tokens = []
        for seq_id in batch:
            position = self.known[seq_id]
            self.known[seq_id] += 1
            ends = position + 1 == self.lengths[seq_id]
            finish = FinishReason.LENGTH if ends else None
            tokens.append(Token(seq_id=seq_id, position=position, token_id=position, finish=finish))
            if ends:
                del self.known[seq_id]
                self.started.discard(seq_id)
        self.sequences.take(TokenBatch(epoch=self.epoch, tokens=tuple(tokens)))

    def die(self, epoch: int, unreported: set[int]) -> None:
        """A stage dies of it, or an expert worker: its calls come again in the same epoch."""
        self.deaths += 1
        ends_epoch = self.rng.random() < 0.5
        death = Mourn(STAGE, "killed", 1, blames=True, ends_epoch=ends_epoch)
        _, messages = self.sequences.on_death(death)
        if ends_epoch:
            self.sequences.suspend()
        self.tell(messages)
        self.report(epoch, unreported)
        if ends_epoch:
            self.begin()

    def look_around(self) -> None:
        self.sequences._suspects.check_invariants()
        if self.sequences.wants_epoch:
            self.sequences.suspend()
            self.begin()
        self.tell(self.sequences.let_in())

    def run(self, arrivals: dict[int, list[int]]) -> None:
        self.begin()
        for turn in range(20_000):
            for seq_id in arrivals.pop(turn, []):
                self.ask(seq_id)
            self.look_around()
            if not len(self.sequences) and not arrivals:
                return
            self.step()
        raise AssertionError("it never ends")

    def check(self) -> None:
        for seq_id, output in enumerate(self.outputs):
            tokens = [t.token_id for t in output if isinstance(t, Token)]
            if seq_id in self.poison:
                assert tokens == list(range(self.poison[seq_id]))
                assert isinstance(output[-1], WorkerKilled)
            else:
                assert tokens == list(range(self.lengths[seq_id])), "a healthy one failed"


def drawn(seed: int) -> tuple[World, dict[int, list[int]]]:
    rng = random.Random(seed)
    count = rng.choice([1, 2, 3, 8, 20])
    lengths = [rng.randint(1, 6) for _ in range(count)]
    share = rng.choice([0.0, 0.1, 0.3, 1.0])
    poison = {s: rng.randrange(lengths[s]) for s in range(count) if rng.random() < share}
    arrivals: dict[int, list[int]] = {}
    for seq_id in range(count):
        arrivals.setdefault(rng.choice([0, rng.randrange(60)]), []).append(seq_id)
    return World(seed, lengths, poison), arrivals


@pytest.mark.parametrize("seed", range(300))
def test_every_poisonous_request_fails_and_no_other(seed: int) -> None:
    world, arrivals = drawn(seed)
    world.run(arrivals)
    world.check()
    depth = max(1, math.ceil(math.log2(len(world.lengths))))
    assert world.deaths <= len(world.poison) * (2 + depth)
    suspects = world.sequences._suspects
    assert (suspects._strikes, suspects._open, len(suspects._groups)) == ({}, set(), 0)


@pytest.mark.parametrize("seed", range(100))
def test_reports_that_come_after_the_death_count_too(seed: int) -> None:
    world, arrivals = drawn(seed)
    world.late_reports = True
    world.run(arrivals)
    world.check()


@pytest.mark.parametrize("seed", range(60))
def test_clients_may_leave_at_any_time(seed: int) -> None:
    world, arrivals = drawn(seed)
    leaves = {s for s in range(len(world.lengths)) if world.rng.random() < 0.4}
    step = world.step

    def step_and_leave() -> None:
        step()
        for seq_id in [s for s in leaves if world.rng.random() < 0.05]:
            leaves.discard(seq_id)
            world.tell(world.sequences.drop(seq_id))

    world.step = step_and_leave  # type: ignore[method-assign]
    world.run(arrivals)
    for seq_id, output in enumerate(world.outputs):
        if seq_id not in world.poison:
            assert not any(isinstance(item, Exception) for item in output)
    suspects = world.sequences._suspects
    assert (suspects._strikes, suspects._open, len(suspects._groups)) == ({}, set(), 0)


def test_rows_that_come_again_are_no_progress() -> None:
    """A computation that dies at its second chunk repeats its first one in every epoch."""
    sequences, out = LiveSequences(), []
    want = Want(logits=True)
    entry = JournalEntry(1, (1, 2, 3), SamplingParams(max_tokens=0), 0, out.append, want)
    sequences.begin(1)
    sequences.add(entry)
    rows = WantedRows(seq_id=1, name="logits", start=0, dtype="float32", shape=(2, 1), data=b"8")
    death = Mourn(STAGE, "killed", 1, blames=True, ends_epoch=True)
    for epoch in (1, 2, 3, 4):
        assert not any(isinstance(item, WorkerKilled) for item in out)
        sequences.take(TokenBatch(epoch=epoch, started=(1,), wanted=(rows,)))
        sequences.on_death(death)
        sequences.suspend()
        sequences.begin(epoch + 1)
        if not len(sequences):
            break
    assert isinstance(out[-1], WorkerKilled)
    assert epoch == 3, "two deaths after its only progress, then the one in its trial"


def test_who_gets_on_between_deaths_is_never_suspected() -> None:
    suspects = Suspects()
    for epoch in range(1, 6):
        assert suspects.begin(epoch) is None
        suspects.on_started(epoch, (1, 2))
        suspects.on_progress(1)
        suspects.on_progress(2)
        suspects.on_death(ends_epoch=False)
        suspects.on_progress(1)
        suspects.on_progress(2)
        assert not suspects.wants_epoch
        suspects.on_death(ends_epoch=True)


def test_what_the_engine_said_last_may_come_after_the_death() -> None:
    suspects = Suspects()
    for epoch in (1, 2):
        assert suspects.begin(epoch) is None
        assert suspects.on_death(ends_epoch=True) is None
        suspects.on_started(epoch, (7,))
        suspects.on_started(epoch - 1, (8,))
    assert suspects.begin(3) == {7}


def test_a_verdict_ends_the_epoch_too() -> None:
    """Calls of the guilty one may still wait for an expert worker to come up."""
    suspects = Suspects()
    for epoch in (1, 2, 3):
        suspects.begin(epoch)
        suspects.on_started(epoch, (7,))
        found = suspects.on_death(ends_epoch=False)
        if epoch < 3:
            assert found is None
    assert found == 7
    suspects.on_end(7)
    assert suspects.wants_epoch
    assert not suspects.everyone_may_run
    assert suspects.begin(4) is None
    assert suspects.everyone_may_run


def test_who_waits_for_a_trial_is_unknown_to_the_engine() -> None:
    sequences, out = LiveSequences(), []
    for seq_id in (1, 2):
        sequences.add(JournalEntry(seq_id, (1,), SamplingParams(max_tokens=9), 0, out.append))
    for epoch in (1, 2):
        assert len(sequences.begin(epoch)) == 2
        sequences.take(TokenBatch(epoch=epoch, started=(1,)))
        sequences.on_death(Mourn(STAGE, "killed", 1, blames=True, ends_epoch=True))
        sequences.suspend()
    assert [admit.seq_id for admit in sequences.begin(3)] == [1]
    assert sequences.drop(2) == ()
    assert len(sequences.drop(1)) == 1
