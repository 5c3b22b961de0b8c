"""What the engine notes of traced steps, what a stage measures, what the ingress makes of both."""

from __future__ import annotations

import pytest

from router.codec import decode, encode
from router.step import Admit, SamplingParams, ScheduledSequence, StepPlan, StepResult, TokenBatch
from router.step_trace import LayerTrace, StageTrace, StepTrace, TracedRow
from shards.client import SequenceRefused
from shards.exchange_meter import StepMeter
from shards.journal import Journal, JournalEntry
from shards.sequence_trace import MAX_EVENTS, SequenceTrace, TracedStep
from shards.traced_steps import TracedSteps

SAMPLING = SamplingParams(max_tokens=4)


def admit(seq_id: int, *, traced: bool) -> Admit:
    return Admit(seq_id=seq_id, epoch=1, prompt=(1, 2), sampling=SAMPLING, traced=traced)


def row(seq_id: int, num_tokens: int = 1, *, samples: bool = True) -> ScheduledSequence:
    return ScheduledSequence(
        seq_id=seq_id, start=0, num_tokens=num_tokens, token_ids=(7,) * num_tokens,
        length=num_tokens, samples=samples,
    )  # fmt: skip


def plan(step_id: int, *rows: ScheduledSequence) -> StepPlan:
    return StepPlan(epoch=1, step_id=step_id, scheduled=rows)


def test_only_steps_with_traced_sequences_are_told() -> None:
    steps = TracedSteps()
    steps.admit(admit(1, traced=False))
    assert not steps
    steps.admit(admit(2, traced=True))
    assert steps
    untraced = plan(0, row(1))
    assert steps.begin(untraced, 10.0) is untraced
    asked = steps.begin(plan(1, row(1, 3), row(2, 5, samples=False)), 11.0)
    assert asked.trace == ()
    steps.come_back(StepResult(epoch=1, step_id=0), 12.0)
    assert steps.take(12.5) == ()
    stages = (StageTrace(stage=0, seconds=0.5, exchange_seconds=0.25),)
    steps.come_back(StepResult(epoch=1, step_id=1, trace=stages), 13.0)
    [told] = steps.take(13.5)
    rows = (TracedRow(seq_id=2, num_tokens=5, samples=False),)
    assert told == StepTrace(
        began_ago=2.5, ended_ago=0.5, num_sequences=2, num_tokens=8, rows=rows, stages=stages
    )
    assert steps.take(14.0) == ()


def test_nothing_is_left_behind() -> None:
    steps = TracedSteps()
    steps.admit(admit(1, traced=True))
    steps.begin(plan(0, row(1)), 1.0)
    steps.end(1)
    assert steps, "its step is still under way"
    steps.come_back(StepResult(epoch=1, step_id=0), 2.0)
    steps.take(2.0)
    assert not steps
    steps.admit(admit(2, traced=True))
    steps.begin(plan(1, row(2)), 3.0)
    steps.reset()
    assert not steps


def test_time_of_exchanges_that_overlap_counts_once() -> None:
    meter = StepMeter(stage=1, began=0.0)
    meter.open(4, 100, 1.0)
    meter.open(4, 50, 2.0)
    meter.close(4, 1.0, 3.0)
    meter.open(5, 10, 3.5)
    meter.close(4, 2.0, 4.0)
    meter.close(5, 3.5, 6.0)
    meter.open(6, 1, 8.0)
    meter.close(6, 8.0, 9.0)
    assert meter.trace(10.0) == StageTrace(
        stage=1,
        seconds=10.0,
        exchange_seconds=5.0 + 1.0,
        layers=(
            LayerTrace(layer=4, exchanges=2, seconds=2.0 + 2.0, num_bytes=150),
            LayerTrace(layer=5, exchanges=1, seconds=2.5, num_bytes=10),
            LayerTrace(layer=6, exchanges=1, seconds=1.0, num_bytes=1),
        ),
    )


def step(
    began_ago: float, ended_ago: float, tokens: int, *, samples: bool = True, heard: float
) -> TracedStep:
    traced = TracedRow(seq_id=1, num_tokens=tokens, samples=samples)
    layers = (LayerTrace(layer=2, exchanges=2, seconds=0.3, num_bytes=10),)
    stages = (
        StageTrace(stage=0, seconds=0.5, exchange_seconds=0.0),
        StageTrace(stage=1, seconds=0.25, exchange_seconds=0.2, layers=layers),
    )
    told = StepTrace(
        began_ago=began_ago, ended_ago=ended_ago, num_sequences=3, num_tokens=20, rows=(traced,),
        stages=stages,
    )  # fmt: skip
    return TracedStep(told, traced, heard)


def test_steps_until_the_first_sample_are_prefill() -> None:
    trace = SequenceTrace(num_prompt=12, made=100.0)
    trace.begin(101.0)
    trace.see(step(1.0, 0.0, 8, samples=False, heard=102.0))
    trace.see(step(1.5, 0.5, 4, heard=104.0))
    trace.see(step(2.0, 0.0, 1, heard=106.0))
    trace.see(step(1.0, 0.25, 1, heard=108.0))
    assert trace.prefill is not None
    assert trace.decode is not None
    prefill, decode_ = trace.prefill, trace.decode
    assert (prefill.began, prefill.ended) == (101.0, 103.5)
    assert (prefill.steps, prefill.tokens, prefill.batch_tokens) == (2, 12, 40)
    assert (decode_.began, decode_.ended) == (103.5, 107.75)
    assert (decode_.steps, decode_.tokens, decode_.slowest_s) == (2, 2, 2.0)
    assert decode_.stage_s == {0: 1.0, 1: 0.5}
    assert decode_.exchange_s == pytest.approx(0.4)
    assert decode_.layers[2].exchanges == 4
    assert decode_.layers[2].num_bytes == 20
    assert trace.num_restarts == 0


def test_it_stays_small_and_in_order() -> None:
    trace = SequenceTrace(num_prompt=1, made=100.0)
    for number in range(1000):
        trace.begin(100.0 + number)
        # Ages that lead back to before it was made.
        trace.see(step(5000.0, 4000.0, 1, heard=101.0 + number))
    assert trace.decode is not None
    assert trace.decode.steps == 999
    assert len(trace.decode.notes) == len(trace.restarts) == MAX_EVENTS
    assert trace.num_restarts == 999
    assert trace.prefill is not None
    assert 100.0 <= trace.prefill.began <= trace.prefill.ended <= trace.decode.began
    assert trace.decode.exchange_s <= trace.decode.ended - trace.decode.began


def test_the_journal_asks_and_passes_on() -> None:
    journal = Journal()
    journal.begin(1)
    heard: dict[int, list[object]] = {1: [], 2: []}
    for seq_id, traced in ((1, True), (2, False)):
        entry = JournalEntry(seq_id, (1, 2), SAMPLING, 0, heard[seq_id].append, traced=traced)
        sent = journal.add(entry)
        assert sent is not None
        assert sent.traced is traced
    told = step(1.0, 0.0, 1, heard=0.0).step
    gone = TracedRow(seq_id=9, num_tokens=1, samples=True)
    told = StepTrace(
        began_ago=1.0, ended_ago=0.0, num_sequences=1, num_tokens=1, rows=(*told.rows, gone)
    )
    batch = decode(TokenBatch, encode(TokenBatch(epoch=1, steps=(told,))))
    journal.note_steps(batch, 50.0)
    journal.note_steps(TokenBatch(epoch=2, steps=(told,)), 51.0)
    assert heard == {1: [TracedStep(told, told.rows[0], 50.0)], 2: []}
    assert journal.accept(batch, SequenceRefused).on == ()
