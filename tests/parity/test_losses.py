"""All families: what a forward of a batch returns beside arrays, against Transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deploy.forward import Outputs, plan_forward
from deploy.model_facts import model_facts
from deploy.openai_errors import ApiError
from shards.checkpoint import open_model
from tests.models.driver import tokens_of
from tests.models.oracle import tiny
from tests.parity.battery import assert_close
from tests.parity.cases import case
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.session import Session
from tests.tiny import FAMILIES

IDS = torch.tensor([tokens_of(seed, 11) for seed in (51, 52, 53, 54)])
SPANS = ((0, 11), (4, 11), (0, 6), (5, 6))
"""Real tokens: a whole row, left padding, right padding, one token with both."""
MASK = torch.zeros_like(IDS)
for _row, (_first, _last) in enumerate(SPANS):
    MASK[_row, _first:_last] = 1
REAL = MASK.bool()
# Coefficients of the aux loss that show in the total, one of them where nobody reads it.
COEFFICIENTS: dict[str, dict[str, Any]] = {
    "dbrx": {"router_aux_loss_coef": 0.9, "ffn_config": {"moe_loss_weight": 0.5}},
    "phimoe": {"router_aux_loss_coef": 0.5},
    "jamba": {"router_aux_loss_coef": 0.5},
}

each_family = pytest.mark.parametrize("family", FAMILIES)


class Forward:
    """Batches through `deploy.forward` on both executors."""

    def __init__(self, folder: Path, sessions: list[Session]) -> None:
        config, _ = open_model(folder)
        self._facts = model_facts(config)
        self._sessions = sessions

    def __call__(self, **body: Any) -> Outputs:
        """The outputs, which are the same on both."""
        plan = plan_forward(body, self._facts, 256, 8192)
        local, distributed = (plan.outputs(self._rows(plan, s)) for s in self._sessions)
        _assert_equal(local, distributed)
        return local

    @staticmethod
    def _rows(plan: Any, session: Session) -> list[dict[str, Any]]:
        parts = {session.start(c.tokens, c.want): len(c.tokens) for c in plan.computations()}
        session.step(parts)
        rows = [session.finish(seq_id) for seq_id in parts]
        return [{name: array.numpy() for name, array in row.items()} for row in rows]


def _assert_equal(mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        np.testing.assert_equal(value, other[name], err_msg=name)


@contextmanager
def forward_of(folder: Path) -> Iterator[Forward]:
    with pipeline(folder) as runner:
        yield Forward(folder, [Session(LocalRunner(folder)), Session(runner)])


@torch.no_grad()
def transformers(model: Any, **inputs: Any) -> Any:
    return model(use_cache=False, **inputs)


def assert_rows(actual: Any, expected: Tensor, rows: Tensor = REAL) -> None:
    """[B, S, n] arrays agree at real tokens."""
    assert_close(torch.from_numpy(actual)[rows], expected[rows])


def assert_loss(actual: float | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    assert actual is None or actual == pytest.approx(float(expected), rel=1e-5)


def masked_labels() -> Tensor:
    """-100 at padding, at some real tokens, and where only padding could predict the label."""
    labels = IDS.masked_fill(~REAL, -100)
    labels[0, 3:5] = -100
    for row, (first, _) in enumerate(SPANS):
        labels[row, first] = -100
    return labels


@case(16, "DBRX", "aux loss with a mask, weighed by moe_loss_weight")
@case(62, "all", "loss of labels with -100 and aux loss with a mask")
@each_family
def test_padded_batch(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path, **COEFFICIENTS[family])
    model, labels = corrected(folder), masked_labels()
    options = {"output_router_logits": True, "output_hidden_states": True}
    expected = transformers(model, input_ids=IDS, attention_mask=MASK, labels=labels, **options)
    with forward_of(folder) as forward:
        actual = forward(input_ids=IDS, attention_mask=MASK, labels=labels, **options)
    assert_loss(actual["loss"], expected.loss)
    assert_loss(actual["aux_loss"], expected.aux_loss)
    assert_rows(actual["logits"], expected.logits)
    for mine, other in zip(actual["hidden_states"], expected.hidden_states, strict=True):
        assert_rows(mine, other)
    for mine, other in zip(actual["router_logits"], expected.router_logits, strict=True):
        assert mine.shape == (IDS.numel(), 4)
        assert_rows(mine, other, REAL.flatten())


@case(16, "DBRX", "aux loss without a mask")
@case(62, "all", "losses without a mask, each with and without the other")
@each_family
def test_whole_batch(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path, **COEFFICIENTS[family])
    model = corrected(folder)
    with forward_of(folder) as forward:
        for labels in (None, IDS):
            for routed in (False, True):
                inputs = {"input_ids": IDS, "labels": labels, "output_router_logits": routed}
                actual, expected = forward(**inputs), transformers(model, **inputs)
                assert_rows(actual["logits"], expected.logits, torch.ones_like(REAL))
                assert_loss(actual["loss"], expected.loss)
                assert_loss(actual["aux_loss"], expected.aux_loss)


@case(62, "all", "no label to predict: not a number, as in Transformers")
def test_no_labels(tmp_path: Path, corrected: Any) -> None:
    folder = tiny("dbrx", tmp_path)
    labels = torch.full_like(IDS, -100)
    with forward_of(folder) as forward:
        assert np.isnan(forward(input_ids=IDS, labels=labels)["loss"])
    assert transformers(corrected(folder), input_ids=IDS, labels=labels).loss.isnan()


@case(62, "all", "logits_to_keep: 0, 1, n, more than there are, positions")
@each_family
def test_logits_to_keep(tmp_path: Path, corrected: Any, family: str) -> None:
    folder = tiny(family, tmp_path)
    model = corrected(folder)
    with forward_of(folder) as forward:
        for keep in (0, 1, 4, 11, 99, [0, 3, 7], [10], [5, 2, -1, 2]):
            kept = torch.tensor(keep) if isinstance(keep, list) else keep
            expected = transformers(
                model, input_ids=IDS, attention_mask=MASK, logits_to_keep=kept
            ).logits
            actual = forward(input_ids=IDS, attention_mask=MASK, logits_to_keep=keep)["logits"]
            assert actual.shape == expected.shape, keep
            columns = torch.arange(11)[kept if isinstance(keep, list) else slice(-keep, None)]
            assert_rows(actual, expected, REAL[:, columns])


@case(62, "all", "labels with logits_to_keep are refused, as by Transformers")
def test_labels_of_kept_logits(tmp_path: Path, corrected: Any) -> None:
    folder = tiny("dbrx", tmp_path)
    inputs = {"input_ids": IDS, "labels": IDS, "logits_to_keep": 3}
    with pytest.raises(ValueError, match="batch_size"):
        transformers(corrected(folder), **inputs)
    with (
        forward_of(folder) as forward,
        pytest.raises(ApiError, match="logits_to_keep: allowed is 0 with labels"),
    ):
        forward(**inputs)
