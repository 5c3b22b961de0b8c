"""The whole core against simulated stages that remember what was written where."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine import EngineLimits
from router.step import NO_TOKEN, Admit, SamplingParams
from tests.router.simulation import VOCAB, Ingress, solo_run


def random_limits(random: Random) -> EngineLimits:
    max_model_len = random.choice([2, 9, 24, 40, 40])
    block_size = random.randint(1, 5)
    least = -(-max_model_len // block_size)
    lookahead = random.random() < 0.4
    return EngineLimits(
        block_size=block_size,
        num_blocks=random.randint(least, 2 * least),
        num_state_slots=random.choice([0, 1, 3, 6]),
        max_num_seqs=random.randint(1, 6),
        max_num_batched_tokens=random.choice([1, 3, 8, 24, 60]),
        max_model_len=max_model_len,
        reprefill_length=random.choice([None, random.randint(1, max_model_len)]),
        max_in_flight=1 if lookahead else random.randint(1, 3),
        lookahead=lookahead,
        prefix_caching=random.random() < 0.8,
        num_snapshots=random.choice([0, 1, 2, 9]),
        window=random.choice([None, None, random.randint(1, max_model_len)]),
    )


def random_admit(random: Random, seq_id: int, limits: EngineLimits, epoch: int) -> Admit:
    longest = random.choice([2, 6, limits.max_model_len])
    num_prompt = random.randrange(1, min(longest, limits.max_model_len))
    most = random.choice([0, *[limits.max_model_len + 2] * 5])
    # Few beginnings, so that many sequences share one and part from it somewhere.
    shared = Random(random.randrange(3))
    parts_at = random.randrange(num_prompt + 1)
    prompt = tuple((shared if i < parts_at else random).randrange(VOCAB) for i in range(num_prompt))
    sampling = SamplingParams(
        max_tokens=random.randint(min(1, most), most),
        min_tokens=random.choice([0, 0, 3]),
        stop_token_ids=random.choice([(), (3,), (1, 5)]),
    )
    priority = random.choice([0, 0, 0, -1, 2])
    return Admit(
        seq_id=seq_id,
        epoch=epoch,
        prompt=prompt,
        sampling=sampling,
        priority=priority,
        cache_salt=random.choice(["", "", "", "private"]),
    )


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_every_request_gets_the_tokens_of_its_solo_run(seed: int) -> None:
    random = Random(seed)
    limits, trouble = random_limits(random), random.choice([0.0, 0.0, 0.3])
    ingress = Ingress(limits, random)
    admits: dict[int, Admit] = {}
    for seq_id in range(random.randrange(1, 20)):
        admits[seq_id] = random_admit(random, seq_id, limits, ingress.core.epoch)
        ingress.admit(admits[seq_id])
        for _ in range(random.choice([0, 0, 1, 5])):
            ingress.step()
        if ingress.open and random.random() < trouble:
            ingress.abort(random.choice(sorted(ingress.open)))
        if random.random() < trouble / 4:
            ingress.crash(keep_cache=random.random() < 0.5)
    work = 0
    while ingress.core.has_work:
        ingress.step()
        work += 1
        assert work < 5000, "a request starves"
    for seq_id, tokens in ingress.journal.items():
        got = [(token.token_id, token.finish) for token in tokens]
        assert got == solo_run(admits[seq_id], limits.max_model_len)
        assert all(t.logprob == -t.token_id for t in tokens if t.token_id != NO_TOKEN)
    load = ingress.core.load()
    assert (load.running, load.waiting, load.used_blocks, load.used_slots) == (0, 0, 0, 0)
    # The last sequences' release rides on the next plan: after one more request it is the only
    # sequence the stages know.
    last = random_admit(random, 99, limits, ingress.core.epoch)
    ingress.admit(last)
    ingress.step()
    assert set(ingress.stages.known) == {99}
