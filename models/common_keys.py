"""Keys of config.json that every family has in common, and what Conclave does with them."""

from __future__ import annotations

from models.config_fields import Fields

_BOOKKEEPING = (
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map", "model_type",
    "transformers_version", "tokenizer_class", "finetuning_task", "task_specific_params",
    "custom_pipelines", "base_model_tp_plan", "base_model_ep_plan", "base_model_pp_plan",
)  # fmt: skip
# Which of several equal implementations Transformers picks.
_IMPLEMENTATION = (
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "_experts_implementation", "experts_implementation",
    "_flash_attn_2_enabled", "chunk_size_feed_forward", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "use_cache", "cache_implementation", "gradient_checkpointing",
    "pretraining_tp",
)  # fmt: skip
_TRAINING = ("initializer_range", "attention_dropout")
# What Transformers returns unless a call says otherwise; here every call says.
_OUTPUTS = (
    "return_dict", "output_hidden_states", "output_attentions", "output_router_logits",
    "keys_to_ignore_at_inference",
)  # fmt: skip
# Of encoders and of encoder-decoders.
_OTHER_KINDS = (
    "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder", "decoder_start_token_id",
    "sep_token_id", "prefix",
)  # fmt: skip
# The ingress takes eos_token_id from here when generation_config.json is silent; Transformers
# takes none of the others from a config.json either.
_GENERATION = (
    "bos_token_id", "eos_token_id", "assistant_confidence_threshold", "assistant_lookbehind",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip
# Meant at the top level, where they are read; Transformers writes them into nested objects too.
_NESTED = (
    "dtype", "torch_dtype", "is_encoder_decoder", "add_cross_attention", "pruned_heads",
    "tie_word_embeddings", "per_layer_config", "tie_last_hidden_states",
)  # fmt: skip
_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "pad_token_id")

WITHOUT_EFFECT = frozenset(
    (
        *_BOOKKEEPING, *_IMPLEMENTATION, *_TRAINING, *_OUTPUTS, *_OTHER_KINDS, *_GENERATION,
        *_NESTED, *_LABELS,
    )
)  # fmt: skip
"""Keys that may appear in any object of a config.json and change nothing at inference."""


def refuse_other_kinds(fields: Fields) -> None:
    """Refuse what would make another model of a known family. Raises ConfigError."""
    for key in ("is_encoder_decoder", "add_cross_attention"):
        fields.only(key, False, "only decoders are served")
    fields.only("is_causal", True, "only causal attention is served")
    for key in ("pruned_heads", "per_layer_config"):
        fields.only(key, {}, "all layers of a kind are alike")
    fields.only("tie_last_hidden_states", True, "the last hidden states follow the final norm")


def notes(fields: Fields, without_effect: frozenset[str]) -> tuple[str, ...]:
    """One sentence that names the keys nobody knows, or nothing."""
    unknown = sorted(fields.unknown(WITHOUT_EFFECT | without_effect))
    if not unknown:
        return ()
    shown = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if unknown[20:] else "")
    return (f"config.json: not known and without effect: {shown}",)
