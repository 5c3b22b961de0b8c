"""The arrays that callers want beside tokens: rows of a batch on their way out of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.interface import StageModel
from models.layers.rowwise import pad_rows
from router.step import ScheduledSequence, Want, WantedRows


def rows_of(seq_id: int, name: str, start: int, values: Tensor) -> WantedRows:
    """`values` [n, ...] as float32, or as int64 where they are ids, from row `start` on."""
    integral = not values.is_floating_point()
    plain = values.to("cpu", torch.int64 if integral else torch.float32).contiguous()
    return WantedRows(
        seq_id=seq_id,
        name=name,
        start=start,
        dtype="int64" if integral else "float32",
        shape=tuple(plain.shape),
        data=plain.numpy().tobytes(),
    )


def head_rows(
    stage: StageModel,
    want: Want,
    prompt: Sequence[int],
    scheduled: ScheduledSequence,
    normed: Tensor,
) -> Iterator[WantedRows]:
    """What the heads make of one sequence's chunk, [n, D] after the final norm."""
    seq_id, start = scheduled.seq_id, scheduled.start
    first, offsets = _wanted_logits(want, scheduled)
    if offsets:
        logits = stage.logits(pad_rows(normed[offsets]))[: len(offsets)]
        yield rows_of(seq_id, "logits", first, logits)
    scored = _scored_offset(want, scheduled)
    if scored is not None:
        yield rows_of(seq_id, "score", 0, stage.scores(pad_rows(normed[scored : scored + 1]))[:1])
    targets = prompt[start + 1 : start + 1 + scheduled.num_tokens]
    if want.prompt_logprobs is not None and targets:
        logits = stage.logits(pad_rows(normed[: len(targets)]))[: len(targets)]
        yield from _prompt_logprobs(seq_id, start, logits, targets, want.prompt_logprobs)


def _wanted_logits(want: Want, scheduled: ScheduledSequence) -> tuple[int, list[int]]:
    """Row in the whole `logits` array, and offsets within this chunk, of the logits wanted here."""
    if not want.logits:
        return 0, []
    if not want.logits_positions:
        return scheduled.start, list(range(scheduled.num_tokens))
    before = sum(p < scheduled.start for p in want.logits_positions)
    end = scheduled.start + scheduled.num_tokens
    inside = [p - scheduled.start for p in want.logits_positions if scheduled.start <= p < end]
    return before, inside


def _scored_offset(want: Want, scheduled: ScheduledSequence) -> int | None:
    """Offset within this chunk of the position to score; None when it is elsewhere."""
    if want.score_position is None:
        return None
    offset = want.score_position - scheduled.start
    return offset if 0 <= offset < scheduled.num_tokens else None


def _prompt_logprobs(
    seq_id: int, start: int, logits: Tensor, targets: Sequence[int], num_best: int
) -> Iterator[WantedRows]:
    """Log-probabilities of `targets`, the tokens that follow positions start.. of the prompt.

    `logits` [n, V] are those positions' own; equal values rank by rising id.
    """
    logprobs = torch.log_softmax(logits.to("cpu", torch.float32), dim=-1)
    chosen = torch.tensor(targets, dtype=torch.int64)[:, None]
    # A stable sort, not topk: equal log-probabilities must come in the order of their ids.
    order = torch.sort(logprobs, dim=-1, descending=True, stable=True).indices
    ids = torch.cat([chosen, order[:, :num_best]], dim=1)
    ranks = (order == chosen).int().argmax(dim=-1) + 1
    yield rows_of(seq_id, "prompt_logprobs", start, logprobs.gather(1, ids))
    yield rows_of(seq_id, "prompt_top_ids", start, ids)
    yield rows_of(seq_id, "prompt_ranks", start, ranks.long())
