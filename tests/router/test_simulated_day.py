"""A day of traffic on far too little memory: nothing lost, changed, leaked or left to wait."""

from __future__ import annotations

from random import Random

import pytest

from router.limits import EngineLimits
from router.sequence import MAX_OVERTAKES
from router.step import Admit, SamplingParams, StepPlan
from tests.router.simulation import VOCAB, Ingress, SimulatedStages, solo_run

LIMITS: dict[str, EngineLimits] = {
    kind: EngineLimits(
        block_size=4,
        num_blocks=60,
        max_num_seqs=16,
        max_num_batched_tokens=48,
        max_model_len=240,
        prefix_caching=True,
        **{"max_in_flight": 2, **more},  # type: ignore[arg-type]
    )
    for kind, more in {
        "attention": {"num_state_slots": 0},
        "long rope": {"num_state_slots": 0, "reprefill_length": 60},
        "window": {"num_state_slots": 0, "window": 30},
        "recurrent": {"num_state_slots": 12, "num_snapshots": 10},
        "one stage": {
            "num_state_slots": 12,
            "num_snapshots": 10,
            "max_in_flight": 1,
            "lookahead": True,
        },
    }.items()
}


class Watch(SimulatedStages):
    """Counts, for each sequence, how many later arrivals had started when it first did."""

    def __init__(self, limits: EngineLimits, random: Random) -> None:
        super().__init__(limits, random)
        self.started: set[int] = set()
        self.overtaken: dict[int, int] = {}

    def submit(self, plan: StepPlan) -> None:
        for new in plan.new:
            if new.seq_id not in self.started:
                self.overtaken[new.seq_id] = sum(other > new.seq_id for other in self.started)
            self.started.add(new.seq_id)
        super().submit(plan)


def request(random: Random, seq_id: int) -> Admit:
    """Heavy tails on both ends; half of the prompts share a beginning with many others."""
    num_prompt = min(200, 1 + int(random.paretovariate(1.1) * 12))
    shared = Random(random.randrange(3))
    parts_at = num_prompt // 2 if random.random() < 0.5 else 0
    prompt = tuple((shared if i < parts_at else random).randrange(VOCAB) for i in range(num_prompt))
    max_tokens = min(239 - num_prompt, int(random.paretovariate(0.8) * 14))
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(7,))
    return Admit(seq_id=seq_id, epoch=0, prompt=prompt, sampling=sampling)


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize(
    "num_requests", [300, pytest.param(5000, marks=pytest.mark.slow)], ids=["hour", "day"]
)
def test_every_request_ends_with_the_tokens_it_has_alone(kind: str, num_requests: int) -> None:
    random = Random(f"{kind} {num_requests}")
    limits = LIMITS[kind]
    ingress = Ingress(limits, random)
    watch = ingress.stages = Watch(limits, random)
    requests: dict[int, Admit] = {}
    while len(requests) < num_requests or ingress.core.has_work:
        # Arrivals keep ahead of what can be served, in bursts.
        for _ in range(random.choice([0, 0, 0, 1, 6]) if len(ingress.open) < 60 else 0):
            if len(requests) < num_requests:
                admit = request(random, len(requests))
                requests[admit.seq_id] = admit
                ingress.admit(admit)
        if ingress.open and random.random() < 0.01:
            ingress.abort(random.choice(sorted(ingress.open)))
        if ingress.core.has_work:
            ingress.step()
    for seq_id, tokens in ingress.journal.items():
        got = [(token.token_id, token.finish) for token in tokens]
        assert got == solo_run(requests[seq_id], limits.max_model_len)
    load = ingress.core.load()
    assert (load.running, load.waiting, load.used_blocks, load.used_slots) == (0, 0, 0, 0)
    # Snapshots are a cache: every one of them can be given back, and then none is left.
    snapshots = ingress.core._scheduler.cache.snapshots
    for key in list(snapshots._slot_of):
        snapshots.forget(key)
    ingress.core.check_invariants()
    assert ingress.core.load().used_snapshots == 0
    assert load.preemptions > 0, "memory must be short"
    assert load.prefix_hit_tokens > 0.02 * load.prefix_tokens
    # The documented bound on waiting: overtakes, and those already chosen when it was reached.
    assert max(watch.overtaken.values()) <= MAX_OVERTAKES - 1 + limits.num_seats
