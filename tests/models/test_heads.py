"""What a model ends in: next tokens, classes or both, tied to the embedding or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from models.registry import ConfigError, load_config, parse_config
from tests.models.driver import Chunk, Served, read_checkpoint, tokens_of
from tests.models.oracle import assert_close, edit_config, reference, tiny, write_checkpoint

TOKENS = tokens_of(3, 21)
LABELS = {"0": "good", "1": "bad", "2": "ugly"}
CLASSIFYING = ("phimoe", "jamba")


def classifier(family: str, folder: Path, **overrides: Any) -> Path:
    """A tiny classifier of three labels."""
    return tiny(family, folder, classifier=True, id2label=LABELS, **overrides)


@torch.no_grad()
def reference_scores(folder: Path) -> torch.Tensor:
    """Transformers' scores [3] of one sequence without padding: those of its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores: torch.Tensor = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return scores


@pytest.mark.parametrize("family", CLASSIFYING)
@pytest.mark.parametrize("cuts", [(), (2,)], ids=["one stage", "two stages"])
def test_scores_are_transformers(family: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    folder = classifier(family, tmp_path)
    assert "lm_head.weight" not in read_checkpoint(folder)
    served = Served.open(folder, cuts=cuts)
    assert served.config.heads == {"score"}
    assert_close(served.scores([Chunk(0, 0, TOKENS)])[0][-1], reference_scores(folder))


@pytest.mark.parametrize("family", CLASSIFYING)
def test_one_backbone_serves_both_heads(family: str, tmp_path: Path) -> None:
    no_bias = {"lm_head_bias": False} if family == "phimoe" else {}
    folder = classifier(family, tmp_path, **no_bias)
    tensors = read_checkpoint(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    write_checkpoint(folder, tensors)
    by_tensors = load_config(folder).with_tensors(frozenset(tensors))
    spelling = {"phimoe": "PhiMoE", "jamba": "Jamba"}[family]
    both = [f"{spelling}ForSequenceClassification", f"{spelling}ForCausalLM"]
    edit_config(folder, architectures=both)
    by_name = load_config(folder)
    assert by_name.heads == by_tensors.heads == {"lm", "score"}
    served = Served.open(folder)
    assert_close(served.step([Chunk(0, 0, TOKENS)])[0], reference(folder, TOKENS))
    assert_close(served.scores([Chunk(1, 0, TOKENS)])[0][-1], reference_scores(folder))


def test_a_score_tensor_beside_a_language_model(tmp_path: Path) -> None:
    config = load_config(tiny("jamba", tmp_path))
    assert config.heads == {"lm"}
    assert config.classifier is None
    both = config.with_tensors(frozenset({"lm_head.weight", "score.weight"}))
    assert both.heads == {"lm", "score"}
    assert both.classifier is not None
    assert both.classifier.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("family", CLASSIFYING)
def test_a_score_bias_is_added(family: str, tmp_path: Path) -> None:
    folder = classifier(family, tmp_path)
    plain = reference_scores(folder)
    bias = torch.tensor([1000.0, -1000.0, 0.0])
    write_checkpoint(folder, {**read_checkpoint(folder), "score.bias": bias})
    edit_config(folder, score_bias=True)
    scores = Served.open(folder).scores([Chunk(0, 0, TOKENS)])[0][-1]
    torch.testing.assert_close(scores, plain + bias, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("family", CLASSIFYING)
@pytest.mark.parametrize("held", ["no", "the same", "another"])
def test_a_tied_head_in_every_file_variant(family: str, held: str, tmp_path: Path) -> None:
    folder = tiny(family, tmp_path, tie_word_embeddings=True)
    tensors = read_checkpoint(folder)
    table = tensors["model.embed_tokens.weight"]
    if held != "no":
        head = table.flip(0) if held == "another" else table
        write_checkpoint(folder, {**tensors, "lm_head.weight": head.clone().contiguous()})
    served = Served.open(folder, cuts=[2])  # the last stage has no embedding to share
    assert_close(served.step([Chunk(0, 0, TOKENS)])[0], reference(folder, TOKENS))
    assert any("tie_word_embeddings" in note for note in served.config.notes) == (held != "no")


def test_a_tied_classifier_needs_no_next_token_head() -> None:
    raw = {"architectures": ["JambaForSequenceClassification"], "tie_word_embeddings": True}
    config = parse_config(raw).with_tensors(frozenset({"score.weight"}))
    assert config.heads == {"score"}


def test_labels_and_problem_types() -> None:
    def read(**keys: Any) -> Any:
        raw = {"architectures": ["PhimoeForSequenceClassification"], **keys}
        return parse_config(raw).classifier

    assert read().labels == ("LABEL_0", "LABEL_1")
    assert read().pad_token_id is None
    assert read(num_labels=3, pad_token_id=7).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert read(num_labels=3, pad_token_id=7).pad_token_id == 7
    assert read(id2label={"1": "b", "0": "a"}, label2id={"a": 0, "b": 1}).labels == ("a", "b")
    assert read(num_labels=1, problem_type="regression").problem_type == "regression"
    jamba = parse_config({"architectures": ["JambaForSequenceClassification"]}).classifier
    assert jamba is not None
    assert jamba.pad_token_id == 0
    null = {"architectures": ["JambaForSequenceClassification"], "pad_token_id": None}
    assert parse_config(null).classifier.pad_token_id is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is"),
        ({"id2label": ["a"]}, "id2label is"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels is 3"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "problem_type is"),
        ({"score_bias": "yes"}, "score_bias is 'yes'"),
    ],
)
def test_wrong_labels_are_named(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({"architectures": ["JambaForSequenceClassification"], **keys})


def test_dbrx_has_no_classifier() -> None:
    with pytest.raises(ConfigError, match="DBRX has no classification head"):
        parse_config({"architectures": ["DbrxForSequenceClassification"]})
    with pytest.raises(ConfigError, match=r"score\.weight: DBRX has no classification head"):
        parse_config({"model_type": "dbrx"}).with_tensors(frozenset({"score.weight"}))
