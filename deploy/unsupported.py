"""Request fields that are known but not served: refused by name, never silently dropped."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from deploy.openai_errors import ApiError

# Bookkeeping of OpenAI's and vLLM's clients: no effect on the answer by its own definition.
IGNORED_FIELDS = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "session_id"}
    | {"parallel_tool_calls", "spaces_between_special_tokens"}
    # Of vLLM's render and multi-modal endpoints, which says so itself.
    | {"return_token_offsets", "mm_payload", "return_mm_kwargs"}
)


def _is(*neutral: object) -> Callable[[Any], bool]:
    # bool is an int: 1 must not pass for True, nor False for 0.
    def allowed(value: Any) -> bool:
        return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)

    return allowed


def _is_text(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.get("type") == "text")


def _is_text_list(value: Any) -> bool:
    return bool(value == ["text"])


# Field → what it may hold anyway, and that in words.
REFUSED_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (_is([]), "an empty list"),
    "tool_choice": (_is("none", "auto"), "none, auto"),
    "functions": (_is([]), "an empty list"),
    "function_call": (_is("none", "auto"), "none, auto"),
    "response_format": (_is_text, '{"type": "text"}'),
    "structured_outputs": (_is({}), "an empty object"),
    "length_penalty": (_is(1), "1"),
    "use_beam_search": (_is(False), "false"),
    "best_of": (_is(1), "1"),
    "echo": (_is(False), "false"),
    "suffix": (_is(""), "an empty string"),
    "truncate_prompt_tokens": (_is(), "null"),
    "truncation_side": (_is("left"), "left"),
    "logits_processors": (_is([]), "an empty list"),
    "return_routed_experts": (_is(False), "false"),
    "chat_template": (_is(), "null"),
    "mm_processor_kwargs": (_is({}), "an empty object"),
    "modalities": (_is_text_list, '["text"]'),
    "audio": (_is(), "null"),
    "prediction": (_is(), "null"),
    "reasoning_effort": (_is(), "null"),
    "verbosity": (_is("medium"), "medium"),
    "web_search_options": (_is(), "null"),
    "moderation": (_is(), "null"),
    "media_io_kwargs": (_is({}), "an empty object"),
    "include_reasoning": (_is(True), "true"),
    "thinking_token_budget": (_is(-1), "-1"),
    "watermarking": (_is(False), "false"),
    "logprob_token_ids": (_is([]), "an empty list"),
    "prompt_embeds": (_is([]), "an empty list"),
    "repetition_detection": (_is(), "null"),
    "stream_interval": (_is(1), "1"),
    "routed_experts_prompt_start": (_is(0), "0"),
    "return_prompt_text": (_is(False), "false"),
    "kv_transfer_params": (_is({}), "an empty object"),
    "ec_transfer_params": (_is({}), "an empty object"),
    "vllm_xargs": (_is({}), "an empty object"),
}

# Fields that vLLM has removed → what it has in their place.
REMOVED_FIELDS = {
    "guided_json": 'structured_outputs {"json": ...}',
    "guided_regex": 'structured_outputs {"regex": ...}',
    "guided_choice": 'structured_outputs {"choice": [...]}',
    "guided_grammar": 'structured_outputs {"grammar": ...}',
    "guided_whitespace_pattern": 'structured_outputs {"whitespace_pattern": ...}',
    "guided_decoding_backend": "structured_outputs, which has one backend",
    "guided_decoding_disable_fallback": "structured_outputs, which has one backend",
    "guided_decoding_disable_any_whitespace": 'structured_outputs {"disable_any_whitespace": ...}',
    "structural_tag": "tools",
}

# Field → what to use instead.
_INSTEAD = {
    "best_of": "n, and choose among the answers",
    "use_beam_search": "n with a temperature",
    "length_penalty": "max_tokens or logit_bias",
    "echo": "continue_final_message, or echo of /v1/completions",
    "suffix": "a prompt that holds both sides",
    "logits_processors": "logit_bias, bad_words or allowed_token_ids",
    "functions": "tools",
    "function_call": "tool_choice",
    "return_routed_experts": "the handle's forward with output_router_logits",
    "logprob_token_ids": "allowed_token_ids with logprobs",
    "return_prompt_text": "/tokenize with the same messages, then /detokenize",
}

# Field → what it may hold without a word, and why it has no effect otherwise.
WITHOUT_EFFECT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "store": (_is(False), "answers are not stored"),
    "service_tier": (_is("auto", "default"), "there is one tier"),
    "prompt_cache_options": (_is({}), "prompts stay cached as long as there is room"),
    "prompt_cache_retention": (_is("in_memory"), "prompts stay cached as long as there is room"),
    "request_id": (_is(), "send the header x-request-id"),
}
KNOWN_FIELDS = IGNORED_FIELDS | WITHOUT_EFFECT.keys() | REFUSED_FIELDS.keys()


def refuse_unsupported(body: Mapping[str, Any], served: Container[str]) -> None:
    """Raise ApiError for the first known field whose value asks for what is not there.

    `served` are the fields that this route does read.
    """
    for field, instead in REMOVED_FIELDS.items():
        if body.get(field) is not None:
            raise ApiError(
                f"{field}: not available any more; use {instead}",
                param=field,
                code="unsupported_parameter",
            )
    for field, (allowed, words) in REFUSED_FIELDS.items():
        value = body.get(field)
        if field not in served and value is not None and not allowed(value):
            instead = f"; use {_INSTEAD[field]}" if field in _INSTEAD else ""
            raise ApiError(
                f"{field}: not available in this version; allowed values: {words}{instead}",
                param=field,
                code="unsupported_parameter",
            )


def without_effect(fields: Mapping[str, Any]) -> list[str]:
    """One sentence for each known field whose value has no effect here."""
    return [
        f"{field} has no effect: {why}"
        for field, (neutral, why) in WITHOUT_EFFECT.items()
        if field in fields and not neutral(fields[field])
    ]
