"""What `forward` may be asked, checked: rows of token ids with padding, and arrays to return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.compute import MAX_STEP_BYTES
from deploy.losses import IGNORED
from deploy.model_facts import ModelFacts
from deploy.openai_errors import ApiError

Integers = NDArray[np.int64]

FIELDS = (
    "input_ids",
    "attention_mask",
    "labels",
    "logits_to_keep",
    "output_router_logits",
    "output_hidden_states",
)
MAX_RESULT_BYTES = 2**30
_ITEM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A row's real tokens: columns `first`..`last`-1; padding is left of them, right, or none."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardRequest:
    """B rows of S columns each. `labels` are unchecked."""

    input_ids: Integers
    """[B, S]."""
    spans: tuple[Span, ...]
    """[B]."""
    labels: object | None
    kept: tuple[int, ...] | None
    """Columns whose logits are returned, in this order; None: all."""
    router_logits: bool
    hidden_states: bool

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def tokens(self, row: int) -> tuple[int, ...]:
        """A row's real tokens."""
        span = self.spans[row]
        return tuple(self.input_ids[row, span.first : span.last].tolist())


def parse_forward(body: object, facts: ModelFacts, max_model_len: int) -> ForwardRequest:
    """Check a handle call's fields. Raises ApiError that names the one at fault."""
    if not isinstance(body, Mapping):
        raise ApiError("forward takes a dict of " + ", ".join(FIELDS))
    for key in body:
        if key not in FIELDS:
            allowed = ", ".join(FIELDS)
            raise ApiError(
                f"{key}: not served; allowed fields are {allowed}",
                param=str(key),
                code="unknown_parameter",
            )
    input_ids = _token_ids(body.get("input_ids"), facts.vocab_size, max_model_len)
    return ForwardRequest(
        input_ids=input_ids,
        spans=_spans(body.get("attention_mask"), input_ids.shape),
        labels=body.get("labels"),
        kept=_kept(body.get("logits_to_keep"), input_ids.shape[1]),
        router_logits=_flag(body, "output_router_logits"),
        hidden_states=_flag(body, "output_hidden_states"),
    )


def token_labels(request: ForwardRequest, vocab_size: int) -> Integers | None:
    """Labels [B, S] of a causal language model, IGNORED where there is none. Raises ApiError."""
    if request.labels is None:
        return None
    if request.kept is not None:
        raise ApiError(
            "logits_to_keep: allowed is 0 with labels, because the loss reads every position",
            param="logits_to_keep",
        )
    labels = integers("labels", request.labels)
    if labels.shape != request.shape:
        raise _refused("labels", f"the shape is {list(labels.shape)}, not {list(request.shape)}")
    if not ((labels == IGNORED) | ((labels >= 0) & (labels < vocab_size))).all():
        raise _refused("labels", f"allowed are 0..{vocab_size - 1} and {IGNORED}")
    return labels


def step_bytes(request: ForwardRequest, facts: ModelFacts, max_num_batched_tokens: int) -> int:
    """Bytes of arrays that a step may return of one row, at most.

    Raises ApiError for a result larger than what may be held, or be on its way, at once.
    """
    batch, columns = request.shape
    num_kept = columns if request.kept is None else len(request.kept)
    widths = {
        "logits_to_keep": facts.vocab_size if facts.predicts_tokens else 0,
        "output_hidden_states": (facts.num_layers + 1) * facts.hidden_size * request.hidden_states,
        "output_router_logits": len(facts.moe_layers) * facts.num_experts * request.router_logits,
    }
    counts = {field: num_kept if field == "logits_to_keep" else columns for field in widths}
    result = {f: batch * counts[f] * _ITEM * width for f, width in widths.items()}
    if sum(result.values()) > MAX_RESULT_BYTES:
        raise _refused(
            max(result, key=result.__getitem__),
            f"the result would have {sum(result.values())} bytes, allowed are {MAX_RESULT_BYTES}",
        )
    step = {
        f: min(counts[f], max_num_batched_tokens) * _ITEM * width for f, width in widths.items()
    }
    if sum(step.values()) > MAX_STEP_BYTES:
        raise _refused(
            max(step, key=step.__getitem__),
            f"a step of max_num_batched_tokens={max_num_batched_tokens} would return "
            f"{sum(step.values())} bytes of one row, allowed are {MAX_STEP_BYTES}",
        )
    return sum(step.values())


def integers(field: str, value: object, kinds: str = "iu") -> Integers:
    """A list, nested list or array of integers (or numpy's other `kinds`) as int64.

    Raises ApiError that names `field`.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise _refused(field, "must be a rectangular array of integers") from error
    if array.dtype.kind not in kinds or (array > np.iinfo(np.int64).max).any():
        raise _refused(field, "must be a rectangular array of integers")
    return array.astype(np.int64)


def _token_ids(value: object, vocab_size: int, max_model_len: int) -> Integers:
    if value is None:
        raise _refused("input_ids", "required")
    array = integers("input_ids", value)
    if array.ndim != 2 or not array.size:
        raise _refused("input_ids", f"must be [B, S], not empty; the shape is {list(array.shape)}")
    if array.shape[1] > max_model_len:
        raise ApiError(
            f"input_ids: rows have {array.shape[1]} tokens, allowed are {max_model_len}",
            param="input_ids",
            code="context_length_exceeded",
        )
    wrong = array[(array < 0) | (array >= vocab_size)]
    if wrong.size:
        raise _refused(
            "input_ids", f"token id {wrong[0]} is out of range, allowed are 0..{vocab_size - 1}"
        )
    return array


def _spans(value: object, shape: tuple[int, ...]) -> tuple[Span, ...]:
    """Where each row's mask is 1, which must be one run; everywhere without a mask."""
    if value is None:
        return (Span(first=0, last=shape[1]),) * shape[0]
    mask = integers("attention_mask", value, kinds="iub")
    if mask.shape != shape:
        raise _refused("attention_mask", f"the shape is {list(mask.shape)}, not {list(shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise _refused("attention_mask", "allowed are 0 and 1")
    return tuple(_span(index, row) for index, row in enumerate(mask))


def _span(index: int, mask: Integers) -> Span:
    ones = np.flatnonzero(mask)
    if not ones.size:
        raise _refused("attention_mask", f"row {index} has no real token")
    first, last = int(ones[0]), int(ones[-1]) + 1
    if last - first != ones.size:
        raise _refused("attention_mask", f"the ones of row {index} must be one run without a gap")
    return Span(first=first, last=last)


def _kept(value: object, columns: int) -> tuple[int, ...] | None:
    """The columns that `logits_to_keep` names: the last n, or a list; None for all of them."""
    field = "logits_to_keep"
    if value is None:
        return None
    array = integers(field, value)
    if array.ndim == 0:
        count = int(array)
        if count < 0:
            raise _refused(field, f"allowed are 0 (all), a count, or a list; not {count}")
        return None if count in (0, columns) or count > columns else _last(count, columns)
    if array.ndim != 1 or not array.size:
        raise _refused(field, "allowed are a count or a list of columns, not empty")
    if not ((array >= -columns) & (array < columns)).all():
        raise _refused(field, f"allowed columns are {-columns}..{columns - 1}")
    return tuple((array % columns).tolist())


def _last(count: int, columns: int) -> tuple[int, ...]:
    return tuple(range(columns - count, columns))


def _flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool | np.bool_):
        raise _refused(field, "must be true or false")
    return bool(value)


def _refused(field: str, why: str) -> ApiError:
    return ApiError(f"{field}: {why}", param=field)
