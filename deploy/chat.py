"""Chat templates: the checkpoint's own Jinja text, rendered in a sandbox as Transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deploy.openai_errors import ApiError

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# The space tells whether the template trims: then the mark arrives without it.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(ValueError):
    """A template that does not compile; the message says where."""


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compile(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises ApiError 400 with the template's own words."""
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": _mark_last(messages) if continue_final_message else messages,
            "tools": None,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(values)
        except Exception as error:  # a template runs whatever its author wrote
            raise ApiError(
                f"the chat template refused the messages: {error}",
                param="messages",
                code="chat_template_error",
            ) from error
        return _cut_at_mark(text) if continue_final_message else text


def load_chat_template(folder: Path) -> tuple[ChatTemplate | None, list[str]]:
    """From chat_template.jinja or tokenizer_config.json, or None, with warnings.

    Raises ChatTemplateError.
    """
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        return None, ["no chat template: chat completions are refused"]
    tokens = _read_json(folder / "special_tokens_map.json") | config
    return ChatTemplate(source, _token_texts(tokens)), []


def _token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name in TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ChatTemplateError(f"{file}: not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _compile(source: str) -> Template:
    # The same environment as Transformers' chat_template_utils, so that templates render alike.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _mark_last(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise _cannot_continue("has no text")
    return [*messages[:-1], {**messages[-1], "content": content + _CONTINUE_MARK}]


def _cut_at_mark(text: str) -> str:
    """Everything before the mark; without the space before it if the template trims content."""
    at = text.rfind(_CONTINUE_MARK.strip())
    if at < 0:
        raise _cannot_continue("is not in the rendered prompt")
    whole = text.startswith(_CONTINUE_MARK, at)
    return text[:at] if whole else text[:at].rstrip()


def _cannot_continue(why: str) -> ApiError:
    return ApiError(
        f"continue_final_message: the last message {why}", param="continue_final_message"
    )
