"""Sequence classification: which position is scored, and what the scores say."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

import numpy as np

from deploy.compute import Computation
from deploy.field_warnings import field_warnings
from deploy.losses import MULTI_LABEL, REGRESSION, Floats, softmax
from deploy.model_facts import LabelSet
from deploy.openai_errors import Json
from deploy.openai_replies import usage
from deploy.openai_schema import ClassifyRequest
from deploy.prompts import chat_prompt, check_tokens, text_prompts, too_long
from deploy.served_model import ServedModel
from router.step import Want


def pooled_position(token_ids: Sequence[int], pad_token_id: int | None) -> int:
    """Index of the rightmost token that is not `pad_token_id`; 0 where all are (Transformers).

    The last one without a padding token. The mask plays no part: a real token that equals the
    padding token is skipped too.
    """
    if pad_token_id is None:
        return len(token_ids) - 1
    others = (i for i in range(len(token_ids) - 1, -1, -1) if token_ids[i] != pad_token_id)
    return next(others, 0)


def probabilities(scores: Floats, label_set: LabelSet) -> list[float]:
    """What scores [num_labels] mean: shares of one, independent chances, or plain values."""
    problem = label_set.problem_type
    if problem == REGRESSION or (problem is None and len(scores) == 1):
        return _plain(scores)
    if problem == MULTI_LABEL:
        return _plain(0.5 * (1 + np.tanh(scores / 2)))
    return _plain(softmax(scores))


def _plain(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values]


def classification(index: int, scores: Floats, label_set: LabelSet, *, raw: bool) -> Json:
    """One entry of /v1/classify's `data`, for scores [num_labels]; `raw` returns them as they are.

    The label is the highest score's.
    """
    return {
        "index": index,
        "label": label_set.names[int(scores.argmax())],
        "probs": _plain(scores) if raw else probabilities(scores, label_set),
        "num_classes": len(scores),
    }


def classify_computations(
    inputs: Iterable[tuple[int, ...]], label_set: LabelSet, priority: int
) -> list[Computation]:
    """One per input: its pooled position is scored."""
    return [
        Computation(
            tokens=tokens,
            want=Want(score_position=pooled_position(tokens, label_set.pad_token_id)),
            priority=priority,
        )
        for tokens in inputs
    ]


def classify_inputs(
    model: ServedModel, request: ClassifyRequest, param: str
) -> list[tuple[int, ...]]:
    """The tokens of every input, cut and checked. Raises ApiError."""
    if request.messages is None:
        prompts = text_prompts(model, request, param)
    else:
        prompts = [chat_prompt(model, request)]
    keep = request.truncate_prompt_tokens
    most = model.max_model_len
    inputs = []
    for prompt in prompts:
        tokens = prompt.token_ids
        if keep is not None:
            tokens = tokens[max(0, len(tokens) - (most if keep == -1 else keep)) :]
        check_tokens(model, tokens, param)
        if len(tokens) > most:
            raise too_long(model, f"an input has {len(tokens)} tokens", param)
        inputs.append(tokens)
    return inputs


def classify_body(
    model: ServedModel,
    request: ClassifyRequest,
    label_set: LabelSet,
    inputs: Sequence[tuple[int, ...]],
    scores: Sequence[Floats],
) -> Json:
    """/v1/classify's answer in vLLM's shape."""
    body = {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model.name,
        "data": [
            classification(index, row, label_set, raw=not request.use_activation)
            for index, row in enumerate(scores)
        ],
        "usage": usage(sum(map(len, inputs)), 0),
    }
    if found := field_warnings(model, request):
        body["warnings"] = list(found)
    return body
