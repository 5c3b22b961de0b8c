"""The engine under anything its neighbours may do, in any order: nobody ever gets other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from router.engine import EngineLimits
from router.step import Admit, FinishReason, SamplingParams
from tests.router.drawn_limits import engine_limits
from tests.router.machines import Machine, drive, every_length
from tests.router.simulation import VOCAB, Ingress, solo_run

MAX_LENGTH = 40

# Heavy tails: most are short, some fill the model's context.
lengths = st.sampled_from([1, 1, 2, 2, 3, 4, 5, 6, 8, 11, 14, 18, 22, 28, 39])
sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([0]) | lengths,
    min_tokens=st.sampled_from([0, 0, 3]),
    stop_token_ids=st.sampled_from([(), (3,), (1, 5), tuple(range(0, VOCAB, 4))]),
)
indices = st.integers(0, 10**6)


@dataclass(frozen=True)
class Request:
    """`parts_at` says how much of the prompt it shares with others of its family."""

    family: int
    num_prompt: int
    parts_at: int
    sampling: SamplingParams
    priority: int
    salt: str


requests = st.builds(
    Request,
    family=st.integers(0, 1),
    num_prompt=lengths,
    parts_at=st.sampled_from([MAX_LENGTH, MAX_LENGTH // 2]) | st.integers(0, MAX_LENGTH),
    sampling=sampling_params,
    priority=st.sampled_from([0, 0, 0, -1, 2]),
    salt=st.sampled_from(["", "", "", "private"]),
)


class Driver(Ingress):
    """An ingress whose every move is somebody else's choice; it knows what each must get."""

    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(limits, Random(0))
        self.alone: dict[int, list[tuple[int, FinishReason | None]]] = {}

    def admit(self, admit: Admit) -> None:
        super().admit(admit)
        if admit.seq_id not in self.alone:
            self.alone[admit.seq_id] = solo_run(admit, self.core.limits.max_model_len)

    def plan(self) -> bool:
        plan = self.core.schedule()
        if plan is not None:
            self.core.check_invariants()
            for row in plan.scheduled:
                admit = self.open[row.seq_id]  # KeyError: computed for nobody
                most = min(
                    len(admit.prompt) + admit.sampling.max_tokens, self.core.limits.max_model_len
                )
                assert row.length < most or not admit.sampling.max_tokens, "after the last token"
            self.stages.submit(plan)
        return plan is not None

    def receive(self, seed: int) -> None:
        """The result of any step in flight."""
        self.stages.random = Random(seed)
        result = self.stages.poll(0)
        assert result is not None
        for token in self.core.apply(result):
            assert token.seq_id in self.open, "a token after the end"
            assert token.position == len(self.journal[token.seq_id])
            expected = self.alone[token.seq_id][token.position]
            assert (token.token_id, token.finish) == expected
            self.journal[token.seq_id].append(token)
            if token.finish is not None:
                del self.open[token.seq_id]


class EngineMachine(Machine):
    @initialize(limits=engine_limits(MAX_LENGTH))
    def create(self, limits: EngineLimits) -> None:
        self.driver = Driver(limits)
        self.num_sequences = 0

    @property
    def is_full(self) -> bool:
        return self.driver.core.num_in_flight >= self.driver.core.limits.num_steps

    @precondition(lambda self: len(self.driver.open) < 12)
    @rule(requests=st.lists(requests, min_size=1, max_size=5))
    def arrive(self, requests: list[Request]) -> None:
        for request in requests:
            self.num_sequences += 1
            shared, own = Random(request.family), Random(-self.num_sequences)
            prompt = tuple(
                (shared if i < request.parts_at else own).randrange(VOCAB)
                for i in range(request.num_prompt)
            )
            self.driver.admit(
                Admit(
                    seq_id=self.num_sequences,
                    epoch=self.driver.core.epoch,
                    prompt=prompt,
                    sampling=request.sampling,
                    priority=request.priority,
                    cache_salt=request.salt,
                )
            )
            self.check()

    @rule(num_prompt=st.sampled_from([0, MAX_LENGTH, MAX_LENGTH + 1]))
    def ask_what_cannot_be(self, num_prompt: int) -> None:
        """A request that is refused, and the end of one that is unknown: nothing changes."""
        core = self.driver.core
        before = core.load()
        sampling = SamplingParams(max_tokens=1)
        prompt = (1,) * num_prompt
        admit = Admit(seq_id=10**6, epoch=core.epoch, prompt=prompt, sampling=sampling)
        refusal = core.admit(admit)
        assert refusal is not None
        assert refusal.seq_id == admit.seq_id
        core.abort(admit.seq_id)
        assert core.load() == before

    @precondition(lambda self: self.driver.open)
    @rule(which=indices, crash=st.sampled_from([False] * 5 + [True]), keep_cache=st.booleans())
    def lose(self, which: int, crash: bool, keep_cache: bool) -> None:
        """A client, or everything but the journal and perhaps what the stages remember."""
        if crash:
            self.driver.crash(keep_cache=keep_cache)
        else:
            self.driver.abort(sorted(self.driver.open)[which % len(self.driver.open)])

    @precondition(lambda self: self.driver.core.has_work and not self.is_full)
    @rule()
    def plan(self) -> None:
        planned = self.driver.plan()
        assert planned or self.driver.core.num_in_flight, "work is left and none is done"

    @precondition(lambda self: self.driver.core.num_in_flight)
    @rule(seed=st.integers(0, 5))
    def receive(self, seed: int) -> None:
        self.driver.receive(seed)

    @precondition(lambda self: self.driver.core.has_work)
    @rule(seed=st.integers(0, 5), num_steps=st.integers(1, 30))
    def get_on(self, seed: int, num_steps: int) -> None:
        """As the engine's loop does: plan what can be planned, then take one result."""
        for _ in range(num_steps):
            while not self.is_full and self.driver.plan():
                pass
            if self.driver.core.num_in_flight:
                self.driver.receive(seed)
                self.check()

    def check(self) -> None:
        core = self.driver.core
        core.check_invariants()
        load = core.load()
        assert core.has_work == (load.running + load.waiting > 0)
        assert len(self.driver.open) <= load.running + load.waiting
        assert core.num_in_flight == len(self.driver.stages.steps)
        assert load.used_snapshots <= load.total_snapshots

    def finish(self) -> None:
        """All come to their end, and nothing is held."""
        num_steps = 0
        while self.driver.core.has_work:
            self.get_on(seed=num_steps, num_steps=1)
            num_steps += 1
            assert num_steps < 5000, "a request starves"
        while self.driver.core.num_in_flight:
            self.driver.receive(0)
        assert not self.driver.open
        for seq_id, tokens in self.driver.journal.items():
            got = [(token.token_id, token.finish) for token in tokens]
            assert got == self.driver.alone[seq_id]
        load = self.driver.core.load()
        assert (load.running, load.waiting, load.used_blocks, load.used_slots) == (0, 0, 0, 0)


@every_length
def test_every_sequence_ends_with_the_tokens_it_has_alone(num_operations: int) -> None:
    drive(EngineMachine, num_operations)
