"""One forward of the model over a batch of rows, as Transformers' `model(...)` defines it.

Each row's real tokens are one sequence of their own: padding is never computed. Where Transformers
returns whatever it computed at padding, every array here holds zeros, and a target that such a
position predicts counts as ignored. A row's own length decides on PhiMoE's LongRoPE factors, where
Transformers takes the width of the padded batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.classify import pooled_position
from deploy.compute import Arrays, Computation
from deploy.forward_request import (
    ForwardRequest,
    Integers,
    Span,
    parse_forward,
    step_bytes,
    token_labels,
)
from deploy.losses import (
    ClassTargets,
    Floats,
    class_targets,
    classification_loss,
    cross_entropy,
    load_balancing_loss,
)
from deploy.model_facts import LabelSet, ModelFacts
from deploy.openai_errors import ApiError
from router.step import Want

Outputs = dict[str, Any]


def plan_forward(
    body: object, facts: ModelFacts, max_model_len: int, max_num_batched_tokens: int
) -> CausalForward | ClassificationForward:
    """A checked batch for the model's own head: the next-token head where it has one.

    Raises ApiError.
    """
    request = parse_forward(body, facts, max_model_len)
    row_bytes = step_bytes(request, facts, max_num_batched_tokens)
    if facts.predicts_tokens:
        return CausalForward(request, facts, row_bytes)
    return ClassificationForward(request, facts, facts.need_labels(), row_bytes)


class CausalForward:
    """A batch through a model with a next-token head."""

    def __init__(self, request: ForwardRequest, facts: ModelFacts, row_bytes: int) -> None:
        """Raises ApiError."""
        self._request = request
        self._row_bytes = row_bytes
        self._facts = facts
        self._labels = token_labels(request, facts.vocab_size)

    def computations(self) -> list[Computation]:
        """One sequence per row."""
        request = self._request
        return [
            Computation(
                tokens=request.tokens(row), want=self._want(span), step_bytes=self._row_bytes
            )
            for row, span in enumerate(request.spans)
        ]

    def outputs(self, rows: Sequence[Arrays]) -> Outputs:
        """What Transformers returns, as float32 arrays; None for what was not asked for."""
        request, facts = self._request, self._facts
        batch, columns = request.shape
        loss = self._loss(rows) if self._labels is not None else None
        routers = aux_loss = None
        if request.router_logits:
            names = [f"router_logits.{layer}" for layer in facts.moe_layers]
            routers = [_padded(request, rows, name).reshape(batch * columns, -1) for name in names]
            real = [np.concatenate([_floats(row, name) for row in rows]) for name in names]
            aux_loss = load_balancing_loss(real, facts.top_k)
        if loss is not None and aux_loss is not None:
            loss += facts.aux_loss_coef * aux_loss
        return {
            "loss": loss,
            "aux_loss": aux_loss,
            "logits": self._logits(rows),
            "router_logits": routers,
            "hidden_states": hidden_states(request, facts, rows),
        }

    def _want(self, span: Span) -> Want:
        kept = self._request.kept
        real = () if kept is None else _real(kept, span)
        return Want(
            logits=kept is None or bool(real),
            logits_positions=real,
            router_logits=self._request.router_logits,
            hidden_states=self._request.hidden_states,
        )

    def _logits(self, rows: Sequence[Arrays]) -> Floats:
        """[B, number of kept columns, V]."""
        request, vocab_size = self._request, self._facts.vocab_size
        if request.kept is None:
            return _padded(request, rows, "logits")
        kept = np.array(request.kept)
        logits = np.zeros((len(rows), len(kept), vocab_size), np.float32)
        for target, row, span in zip(logits, rows, request.spans, strict=True):
            real = (kept >= span.first) & (kept < span.last)
            if real.any():
                positions = kept[real] - span.first
                target[real] = row["logits"][np.searchsorted(np.unique(positions), positions)]
        return logits

    def _loss(self, rows: Sequence[Arrays]) -> float:
        return cross_entropy(self._targets(rows))

    def _targets(self, rows: Sequence[Arrays]) -> Iterator[tuple[Floats, Integers]]:
        """Each row's logits and the labels one column further on."""
        assert self._labels is not None
        for row, span, labels in zip(rows, self._request.spans, self._labels, strict=True):
            targets = labels[span.first + 1 : span.last + 1]
            yield _floats(row, "logits")[: len(targets)], targets


class ClassificationForward:
    """A batch through a model that ends in a classification head alone."""

    def __init__(
        self, request: ForwardRequest, facts: ModelFacts, label_set: LabelSet, row_bytes: int
    ) -> None:
        """Raises ApiError."""
        self._request = request
        self._row_bytes = row_bytes
        self._facts = facts
        self._columns = _pooled_columns(request, label_set.pad_token_id)
        self._targets: ClassTargets | None = None
        if request.labels is not None:
            self._targets = class_targets(request.labels, len(request.spans), label_set)
        for field, asked in (
            ("logits_to_keep", request.kept is not None),
            ("output_router_logits", request.router_logits),
        ):
            if asked:
                raise ApiError(f"{field}: a classification result has none", param=field)

    def computations(self) -> list[Computation]:
        """One sequence per row, scored at its pooled position."""
        request = self._request
        return [
            Computation(
                tokens=request.tokens(row),
                want=Want(score_position=column - span.first, hidden_states=request.hidden_states),
                step_bytes=self._row_bytes,
            )
            for row, (span, column) in enumerate(zip(request.spans, self._columns, strict=True))
        ]

    def outputs(self, rows: Sequence[Arrays]) -> Outputs:
        """`logits` are the scores [B, num_labels]."""
        scores = np.concatenate([_floats(row, "score") for row in rows])
        return {
            "loss": None if self._targets is None else classification_loss(scores, self._targets),
            "aux_loss": None,
            "logits": scores,
            "router_logits": None,
            "hidden_states": hidden_states(self._request, self._facts, rows),
        }


def hidden_states(
    request: ForwardRequest, facts: ModelFacts, rows: Sequence[Arrays]
) -> list[Floats] | None:
    """L + 1 arrays [B, S, D]: what enters each layer, then the normed output; None if unasked."""
    if not request.hidden_states:
        return None
    layers = range(facts.num_layers + 1)
    return [_padded(request, rows, f"hidden_states.{layer}") for layer in layers]


def _pooled_columns(request: ForwardRequest, pad_token_id: int | None) -> list[int]:
    if pad_token_id is None and len(request.spans) > 1:
        raise ApiError(
            "Cannot handle batch sizes > 1 if no padding token is defined.", param="input_ids"
        )
    columns = [pooled_position(row.tolist(), pad_token_id) for row in request.input_ids]
    for index, (column, span) in enumerate(zip(columns, request.spans, strict=True)):
        if not span.first <= column < span.last:
            raise ApiError(
                f"attention_mask: row {index} is scored at column {column}, the rightmost token "
                "that is not the padding token, but the mask excludes it",
                param="attention_mask",
            )
    return columns


def _real(kept: Sequence[int], span: Span) -> tuple[int, ...]:
    """Positions in a row's sequence of the kept columns that hold real tokens, rising."""
    inside = {column - span.first for column in kept if span.first <= column < span.last}
    return tuple(sorted(inside))


def _floats(row: Arrays, name: str) -> Floats:
    return row[name].astype(np.float32, copy=False)


def _padded(request: ForwardRequest, rows: Sequence[Arrays], name: str) -> NDArray[np.float32]:
    """One array of every row, [B, S, width], zero at padding."""
    batch, columns = request.shape
    padded = np.zeros((batch, columns, rows[0][name].shape[-1]), np.float32)
    for target, row, span in zip(padded, rows, request.spans, strict=True):
        target[span.first : span.last] = row[name]
    return padded
