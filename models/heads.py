"""What a model ends in: a next-token head, a sequence-classification head, or both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.checkpoint_map import head_table, whole
from models.config_fields import Fields
from models.interface import Classifier, TensorSlice

LM = "lm"
SCORE = "score"

_LM_WEIGHT, _LM_BIAS = "lm_head.weight", "lm_head.bias"
_SCORE_WEIGHT, _SCORE_BIAS = "score.weight", "score.bias"
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of a PhiMoE or Jamba model, by name, and how each of them is built."""

    names: frozenset[str]
    tied: bool
    """The next-token head is the embedding table, unless the checkpoint holds its own."""
    lm_head_bias: bool
    score_bias: bool
    """vLLM's key; Transformers' own classification heads have no bias."""
    labelling: Classifier
    """Of the classification head, should there be one."""

    @classmethod
    def parse(
        cls,
        fields: Fields,
        names: frozenset[str],
        *,
        pad_token_id: int | None,
        lm_head_bias: bool = False,
    ) -> Heads:
        """Read the keys of both heads; `pad_token_id` is the family's default."""
        if fields.is_null("pad_token_id"):
            pad_token_id = None
        elif fields.has("pad_token_id"):
            pad_token_id = fields.integer("pad_token_id", 0, minimum=-1)
        labels = _labels(fields)
        problem = None
        if fields.has("problem_type"):
            problem = fields.choice("problem_type", "", _PROBLEM_TYPES)
            if problem == "single_label_classification" and len(labels) == 1:
                raise fields.error("problem_type", "another one where there is only one label")
        return cls(
            names=names,
            tied=fields.flag("tie_word_embeddings", False),
            lm_head_bias=lm_head_bias,
            score_bias=fields.flag("score_bias", False),
            labelling=Classifier(labels=labels, problem_type=problem, pad_token_id=pad_token_id),
        )

    @property
    def classifier(self) -> Classifier | None:
        """The classification head; None without one."""
        return self.labelling if SCORE in self.names else None

    def with_tensors(self, names: frozenset[str]) -> Heads:
        """The same, with every head that a checkpoint of these tensors holds."""
        found = {LM} if names & {_LM_WEIGHT, _LM_BIAS} else set()
        if _SCORE_WEIGHT in names:
            found.add(SCORE)
        return replace(self, names=self.names | found)

    def notes(self, names: frozenset[str]) -> tuple[str, ...]:
        """What a reader should know about a checkpoint of these tensors."""
        if not (self.tied and _LM_WEIGHT in names):
            return ()
        # Transformers 5 and vLLM read it so; Transformers 4 overwrites the head.
        return (
            "tie_word_embeddings is true, but the checkpoint holds an lm_head.weight of its own: "
            "that one is used",
        )

    def tensors(self, table: tuple[int, int]) -> dict[str, TensorSlice]:
        """The heads' parameters; `table` is the embedding's shape [V, D]."""
        parts: dict[str, TensorSlice] = {}
        if LM in self.names:
            parts["lm_head"] = head_table(table, self.tied)
            if self.lm_head_bias:
                parts["lm_head_bias"] = whole(_LM_BIAS, table[:1])
        if SCORE in self.names:
            num_labels = len(self.labelling.labels)
            parts["score"] = whole(_SCORE_WEIGHT, (num_labels, table[1]))
            if self.score_bias:
                parts["score_bias"] = whole(_SCORE_BIAS, (num_labels,))
        return parts


def _labels(fields: Fields) -> tuple[str, ...]:
    """Label names by id; `id2label`, whose JSON keys are strings, wins over `num_labels`."""
    if not fields.has("id2label"):
        return tuple(f"LABEL_{i}" for i in range(fields.integer("num_labels", 2)))
    named = fields.labels("id2label")
    if fields.has("num_labels"):
        fields.only("num_labels", len(named), "as many as id2label names")
    return named
