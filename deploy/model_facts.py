"""What requests are checked against: facts of a model that an ingress holds without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.openai_errors import ApiError

if TYPE_CHECKING:
    from models.interface import Classifier, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSet:
    """A classification head's labels; the ingress's copy of the model's `Classifier`."""

    names: tuple[str, ...]
    """By id."""
    problem_type: str | None
    """regression, single_label_classification, multi_label_classification, or None: decided by
    the labels that a loss is asked for."""
    pad_token_id: int | None
    """Pooling reads the rightmost token with another id; None: the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes and heads of one model, as its config.json and tensors say."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    aux_loss_coef: float
    heads: frozenset[str]
    """`lm`, `score` or both."""
    label_set: LabelSet | None
    """None without a `score` head."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether there is a next-token head."""
        return "lm" in self.heads

    def need_lm_head(self) -> None:
        """Raises ApiError 400 `no_lm_head`."""
        if not self.predicts_tokens:
            raise ApiError(
                "model: this checkpoint has no next-token head, so it cannot generate; "
                "use /v1/classify",
                param="model",
                code="no_lm_head",
            )

    def need_labels(self) -> LabelSet:
        """Raises ApiError 400 `no_classification_head`."""
        if self.label_set is None:
            raise ApiError(
                f"model: this {self.family} checkpoint has no classification head",
                param="model",
                code="no_classification_head",
            )
        return self.label_set


def model_facts(config: ModelConfig) -> ModelFacts:
    """Facts of a parsed configuration."""
    head = config.classifier
    return ModelFacts(
        family=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        moe_layers=tuple(i for i in range(config.num_layers) if config.is_moe_layer(i)),
        num_experts=config.num_experts,
        top_k=config.top_k,
        aux_loss_coef=config.aux_loss_coef,
        heads=config.heads,
        label_set=None if head is None else _label_set(head),
    )


def _label_set(head: Classifier) -> LabelSet:
    return LabelSet(
        names=head.labels, problem_type=head.problem_type, pad_token_id=head.pad_token_id
    )
