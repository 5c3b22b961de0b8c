"""Losses as Transformers computes them, from arrays of float32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.model_facts import LabelSet
from deploy.openai_errors import ApiError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

IGNORED = -100
"""Label that no loss counts."""

REGRESSION = "regression"
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"


def cross_entropy(rows: Iterable[tuple[Floats, Integers]]) -> float:
    """Mean over all targets but IGNORED, NaN where there is none (torch's `cross_entropy`).

    `rows` yields logits [n, C] with their targets [n].
    """
    total, count = 0.0, 0
    for logits, targets in rows:
        counted = np.flatnonzero(targets != IGNORED)
        scores = logits[counted]
        best = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        log_sum = np.log(np.exp(scores - best).sum(axis=-1)) + best[:, 0]
        losses = log_sum - scores[np.arange(len(counted)), targets[counted]]
        total += float(losses.sum(dtype=np.float64))
        count += len(counted)
    return total / count if count else float("nan")


def load_balancing_loss(router_logits: Sequence[Floats], top_k: int) -> float | None:
    """Switch Transformers' auxiliary loss (equations 4 to 6) over all MoE layers at once.

    `router_logits` are [n, E] of real tokens, one per layer. None without MoE layers.
    """
    if not router_logits:
        return None
    num_experts = router_logits[0].shape[-1]
    counts, probabilities = np.zeros((2, num_experts), np.float64)
    num_rows = 0
    for logits in router_logits:
        share = softmax(logits)
        # Plain top-k of the softmax in every family, whatever its gate does.
        chosen = np.argsort(-share, axis=-1, kind="stable")[:, :top_k]
        counts += np.bincount(chosen.ravel(), minlength=num_experts)
        probabilities += share.sum(axis=0, dtype=np.float64)
        num_rows += len(logits)
    return float(num_experts * (counts / num_rows * probabilities / num_rows).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTargets:
    """Labels of B sequences: [B, num_labels] float32, or [B] class ids where one label is right."""

    problem_type: str
    values: NDArray[np.generic]


def class_targets(labels: object, num_sequences: int, label_set: LabelSet) -> ClassTargets:
    """Check labels as Transformers reads them. Raises ApiError.

    A `problem_type` of None is inferred from these labels alone: no call changes the next one's.
    """
    num_labels = len(label_set.names)
    given = _label_array(labels)
    problem = label_set.problem_type
    if problem is None:
        integral = given.dtype.kind in "iu"
        problem = REGRESSION if num_labels == 1 else SINGLE_LABEL if integral else MULTI_LABEL
    single = problem == SINGLE_LABEL
    full = (num_sequences,) if single else (num_sequences, num_labels)
    flat = single or (problem == REGRESSION and num_labels == 1)
    if given.shape != full and not (flat and given.shape in ((num_sequences,), (num_sequences, 1))):
        raise _refused(f"their shape is {list(given.shape)}, {problem} takes {list(full)}")
    values = _class_ids(given, num_labels) if single else given.astype(np.float32)
    return ClassTargets(problem_type=problem, values=values.reshape(full))


def classification_loss(scores: Floats, targets: ClassTargets) -> float:
    """Transformers' `ForSequenceClassificationLoss` of scores [B, num_labels]."""
    if targets.problem_type == SINGLE_LABEL:
        return cross_entropy([(scores, targets.values.astype(np.int64))])
    wanted = targets.values.astype(np.float32)
    if targets.problem_type == REGRESSION:
        return float(np.square(scores - wanted).mean(dtype=np.float64))
    # BCEWithLogitsLoss, in the form that cannot overflow.
    losses = np.maximum(scores, 0) - scores * wanted + np.log1p(np.exp(-np.abs(scores)))
    return float(losses.mean(dtype=np.float64))


def softmax(rows: Floats) -> Floats:
    """Softmax of the last axis."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def _label_array(labels: object) -> NDArray[np.generic]:
    try:
        given = np.asarray(labels)
    except (ValueError, TypeError, OverflowError) as error:
        raise _refused("they must be a rectangular array of numbers") from error
    if given.dtype.kind not in "iuf" or not np.isfinite(given).all():
        raise _refused("they must be finite numbers")
    return given


def _class_ids(given: NDArray[np.generic], num_labels: int) -> Integers:
    if given.dtype.kind == "f":
        raise _refused(f"{SINGLE_LABEL} takes integers")
    ids = given.astype(np.int64)
    allowed = (ids >= 0) & (ids < num_labels)
    if given.dtype.kind == "i":  # a huge unsigned number becomes negative here
        allowed |= ids == IGNORED
    if not allowed.all():
        raise _refused(f"allowed are 0..{num_labels - 1} and {IGNORED}")
    return ids


def _refused(why: str) -> ApiError:
    return ApiError(f"labels: {why}", param="labels")
