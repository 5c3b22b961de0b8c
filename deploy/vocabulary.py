"""What the process that samples must know of a tokenizer to keep to a grammar."""

from __future__ import annotations

from deploy.served_model import ServedModel
from shards.vocabulary import Vocabulary


def vocabulary_of(model: ServedModel) -> Vocabulary | None:
    """Every row of the model's vocabulary, padding too; None without a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return None
    return Vocabulary.of(
        (tokenizer.token_bytes(token_id) for token_id in range(model.vocab_size)),
        [token_id for token_id in tokenizer.special_ids if token_id < model.vocab_size],
        model.defaults.eos_token_ids,
    )
