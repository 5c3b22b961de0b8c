"""PhiMoE's classification head: the score of any position, however the sequence is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from deploy.config import ConfigError, parse_args
from deploy.resolve import resolve
from models.registry import load_config
from router.step import Want
from tests.models.driver import tokens_of
from tests.parity.battery import Arrays, assert_close, assert_every_way
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.phimoe_classifier import (
    ORIGINAL,
    PAD,
    free_of_padding,
    load_classifier,
    write_classifier,
)
from tests.parity.remedies import drop_keys, edit_config, full_forward, load, logits_of
from tests.parity.session import Session

# Tokens and the position that Transformers scores with padding token 5.
ROWS: dict[str, tuple[list[int], int]] = {
    "no padding": (free_of_padding(tokens_of(1, 9)), 8),
    "one token": ([7], 0),
    "padding token within": ([*free_of_padding(tokens_of(2, 4)), PAD, 8, PAD, PAD, 9], 8),
    "padding token at the end": ([*free_of_padding(tokens_of(3, 6)), PAD, PAD], 5),
    "nothing but padding tokens": ([PAD] * 7, 0),
    "beyond the original context": (free_of_padding(tokens_of(4, ORIGINAL + 5)), ORIGINAL + 4),
}


def scores_of(session: Session, rows: Sequence[tuple[list[int], int]]) -> list[Arrays]:
    """The score of each row's own position, all rows in one batch."""
    ids = [session.start(tokens, Want(score_position=at)) for tokens, at in rows]
    session.step({seq_id: len(tokens) for seq_id, (tokens, _) in zip(ids, rows, strict=True)})
    return [session.finish(seq_id) for seq_id in ids]


def assert_scores_everywhere(
    folder: Path, rows: Sequence[tuple[list[int], int]], expected: Sequence[Tensor]
) -> None:
    """Scores [num_labels] of each row on both executors, the same bits in every way."""
    local = Session(LocalRunner(folder))
    packed = scores_of(local, rows)
    for (tokens, at), arrays, reference in zip(rows, packed, expected, strict=True):
        assert_close(arrays["score"][0], reference, f"{len(tokens)} tokens scored at {at}")
    with pipeline(folder, stages=2) as runner:
        for where, session in (("local", local), ("pipeline", Session(runner))):
            for (tokens, at), arrays in zip(rows, packed, strict=True):
                want = Want(score_position=at)
                assert_every_way(session, [tokens], [arrays], want, where)


@case(38, "PhiMoE", "classification scores, one to several labels, at Transformers' position")
@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_scores(tmp_path: Path, longrope_switches_factors: Any, num_labels: int) -> None:
    folder = write_classifier(tmp_path, num_labels, pad_token_id=PAD)
    model = longrope_switches_factors(load_classifier(folder))
    expected = [full_forward(model, tokens).logits[0] for tokens, _ in ROWS.values()]
    assert_scores_everywhere(folder, list(ROWS.values()), expected)
    classifier = load_config(folder).classifier
    assert classifier is not None
    assert classifier.pad_token_id == PAD
    assert dict(enumerate(classifier.labels)) == model.config.id2label


@case(38, "PhiMoE", "without `pad_token_id` the last token is scored, whatever it is")
def test_no_padding_token(tmp_path: Path, longrope_switches_factors: Any) -> None:
    folder = write_classifier(tmp_path, 3, pad_token_id=None)
    model = longrope_switches_factors(load_classifier(folder))
    rows = [(tokens, len(tokens) - 1) for tokens, _ in ROWS.values()]
    expected = [full_forward(model, tokens).logits[0] for tokens, _ in rows]
    assert_scores_everywhere(folder, rows, expected)
    classifier = load_config(folder).classifier
    assert classifier is not None
    assert classifier.pad_token_id is None


@case(38, "PhiMoE", "both spellings of the classifier's architecture, labels by number alone")
@pytest.mark.parametrize("spelling", ["PhiMoE", "Phimoe"])
def test_spellings(tmp_path: Path, longrope_switches_factors: Any, spelling: str) -> None:
    folder = write_classifier(tmp_path, 4, pad_token_id=PAD)
    drop_keys(folder, "id2label", "label2id")
    edit_config(folder, num_labels=4, architectures=[f"{spelling}ForSequenceClassification"])
    model = longrope_switches_factors(load_classifier(folder))
    tokens, at = ROWS["padding token at the end"]
    expected = full_forward(model, tokens).logits[0]
    assert_close(scores_of(Session(LocalRunner(folder)), [(tokens, at)])[0]["score"][0], expected)
    classifier = load_config(folder).classifier
    assert classifier is not None
    assert dict(enumerate(classifier.labels)) == model.config.id2label


@case(38, "PhiMoE", "one backbone with both heads: logits and scores from the same forward")
def test_both_heads(tmp_path: Path, longrope_switches_factors: Any) -> None:
    folder = write_classifier(tmp_path, 3, keep_lm_head=True, pad_token_id=PAD)
    tokens, at = ROWS["padding token at the end"]
    logits = logits_of(longrope_switches_factors(load(folder)), [tokens])[0]
    score = full_forward(longrope_switches_factors(load_classifier(folder)), tokens).logits[0]
    want = Want(logits=True, score_position=at)
    local = Session(LocalRunner(folder))
    seq_id = local.start(tokens, want)
    local.step({seq_id: len(tokens)})
    arrays = local.finish(seq_id)
    assert_close(arrays["logits"], logits)
    assert_close(arrays["score"][0], score)
    assert_every_way(local, [tokens], [arrays], want, "local")
    with pipeline(folder, stages=2) as runner:
        assert_every_way(Session(runner), [tokens], [arrays], want, "pipeline")


@case(38, "PhiMoE", "a classifier without its head, or with another number of labels, is refused")
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        pytest.param(True, r"missing tensors: score\.weight", id="no head"),
        pytest.param(False, r"score\.weight is \[3, 64\], not \[2, 64\]", id="other labels"),
    ],
)
def test_refused_head(tmp_path: Path, lost: bool, message: str) -> None:
    folder = write_classifier(tmp_path, 3)
    drop_keys(folder, "id2label", "label2id")
    edit_config(folder, num_labels=3 if lost else 2)
    if lost:
        with tensors_of(folder) as tensors:
            del tensors["score.weight"]
    with pytest.raises(ConfigError, match=message):
        resolve(parse_args({"model": str(folder)}))
