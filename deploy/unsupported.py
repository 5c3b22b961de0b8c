"""Request fields that are known but not served: refused by name, never silently dropped."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from deploy.openai_errors import ApiError

# Bookkeeping of OpenAI clients: no effect on the answer by its own definition.
IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"request_id", "parallel_tool_calls", "spaces_between_special_tokens"}
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
    "guided_json": (_is(), "null"),
    "guided_regex": (_is(), "null"),
    "guided_choice": (_is(), "null"),
    "guided_grammar": (_is(), "null"),
    "length_penalty": (_is(1), "1"),
    "use_beam_search": (_is(False), "false"),
    "best_of": (_is(1), "1"),
    "echo": (_is(False), "false"),
    "suffix": (_is(""), "an empty string"),
    "truncate_prompt_tokens": (_is(), "null"),
    "logits_processors": (_is([]), "an empty list"),
    "return_routed_experts": (_is(False), "false"),
    "chat_template": (_is(), "null"),
    "mm_processor_kwargs": (_is({}), "an empty object"),
    "modalities": (_is_text_list, '["text"]'),
    "audio": (_is(), "null"),
    "prediction": (_is(), "null"),
    "reasoning_effort": (_is(), "null"),
    "verbosity": (_is(), "null"),
    "web_search_options": (_is(), "null"),
}


def refuse_unsupported(body: Mapping[str, Any], served: Container[str]) -> None:
    """Raise ApiError for the first known field whose value asks for what is not there.

    `served` are the fields that this route does read.
    """
    for field, (allowed, words) in REFUSED_FIELDS.items():
        value = body.get(field)
        if field not in served and value is not None and not allowed(value):
            raise ApiError(
                f"{field}: not available in this version; allowed values: {words}",
                param=field,
                code="unsupported_parameter",
            )
