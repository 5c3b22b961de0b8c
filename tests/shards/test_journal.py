"""The journal: every emitted token exactly once, whatever the engine repeats or forgets."""

from __future__ import annotations

from router.step import FinishReason, Refusal, SamplingParams, Token, TokenBatch
from shards.client import SequenceRefused
from shards.journal import Journal, JournalEntry, Moved

SAMPLING = SamplingParams(max_tokens=4)


def entry(seq_id: int, into: list[Token | Exception]) -> JournalEntry:
    return JournalEntry(seq_id, (1, 2), SAMPLING, 0, into.append)


def token(seq_id: int, position: int, token_id: int, finish: FinishReason | None = None) -> Token:
    return Token(seq_id=seq_id, position=position, token_id=token_id, finish=finish)


def test_rows_are_accepted_once_in_order_and_only_of_the_open_epoch() -> None:
    journal, out = Journal(), []
    assert journal.add(entry(1, out)) is None, "no engine yet: admitted with the next epoch"
    (admit,) = journal.begin(1)
    assert (admit.prompt, admit.emitted, admit.epoch) == ((1, 2), (), 1)
    batch = TokenBatch(epoch=1, tokens=(token(1, 0, 7),))
    assert journal.accept(batch, SequenceRefused).on == (1,)
    assert journal.accept(batch, SequenceRefused) == Moved(), "a repeated position"
    assert journal.accept(TokenBatch(epoch=1, tokens=(token(1, 5, 9),)), SequenceRefused) == Moved()
    journal.suspend()
    assert journal.accept(TokenBatch(epoch=1, tokens=(token(1, 1, 8),)), SequenceRefused) == Moved()
    (admit,) = journal.begin(2)
    assert admit.emitted == (7,)
    assert journal.accept(TokenBatch(epoch=1, tokens=(token(1, 1, 8),)), SequenceRefused) == Moved()
    end = token(1, 1, 8, FinishReason.STOP)
    assert journal.accept(TokenBatch(epoch=2, tokens=(end,)), SequenceRefused).on == (1,)
    assert [t.token_id for t in out if isinstance(t, Token)] == [7, 8]
    assert len(journal) == 0


def test_dropped_sequences_abort_the_engine_and_are_not_resumed() -> None:
    journal, out = Journal(), []
    journal.begin(1)
    assert journal.add(entry(1, out)) is not None
    abort = journal.drop(1)
    assert abort is not None
    assert abort.epoch == 1
    assert journal.drop(1) is None
    assert journal.begin(2) == ()
    assert journal.accept(TokenBatch(epoch=2, tokens=(token(1, 0, 3),)), SequenceRefused) == Moved()
    assert out == []


def test_refusal_and_failure_end_streams_with_an_error() -> None:
    journal, first, second = Journal(), [], []
    journal.begin(1)
    journal.add(entry(1, first))
    journal.add(entry(2, second))
    refusal = Refusal(seq_id=1, reason="too long")
    journal.accept(TokenBatch(epoch=1, refusals=(refusal,)), SequenceRefused)
    assert isinstance(first[0], SequenceRefused)
    assert str(first[0]) == "too long"
    assert journal.fail(2, RuntimeError("gone")) is not None
    assert journal.fail(2, RuntimeError("gone")) is None
    assert isinstance(second[0], RuntimeError)
    assert len(journal) == 0
