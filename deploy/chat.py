"""Chat templates: the checkpoint's own Jinja text, rendered in a sandbox as Transformers does."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deploy.json_file import read_json_object
from deploy.openai_errors import ApiError

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# The space tells whether the template trims: then the mark arrives without it.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(ValueError):
    """A template that cannot be read or does not compile; the message says where."""


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compile(source)
        # Odd nesting fails in Python's own compiler, with errors that are not Jinja's.
        except Exception as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    @property
    def reads(self) -> frozenset[str]:
        """Names of the variables that it looks at, in whichever branch."""
        tree = self._template.environment.parse(self.source)
        return frozenset(find_undeclared_variables(tree))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises ApiError 400 with the template's own words."""
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": _mark_last(messages) if continue_final_message else messages,
            "tools": tools,
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

    Raises ValueError naming the file: ChatTemplateError where the template is at fault.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            source: str | None = file.read_text(encoding="utf-8")
        else:
            file = folder / "tokenizer_config.json"
            source = _default_source(config.get("chat_template"))
        if source is None:
            return None, ["no chat template: chat completions are refused"]
        tokens = read_json_object(folder / "special_tokens_map.json") | config
        return ChatTemplate(source, _token_texts(tokens)), []
    except UnicodeDecodeError as error:
        raise ChatTemplateError(f"{file}: the chat template is not UTF-8: {error}") from error
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{file}: {error}") from error


def _default_source(value: object) -> str | None:
    """From tokenizer_config.json's `chat_template`: one text, or several by name."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        defaults = [e.get("template") for e in value if e.get("name") == "default"]
        value = defaults[-1] if defaults else None
    if value is not None and not isinstance(value, str):
        raise ChatTemplateError(
            "chat_template must be a text or a list of objects with a `name` and a `template`, "
            f"not {reprlib.repr(value)}"
        )
    return value


def _token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name in TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training: its text stays as it is.

    A call block as in Transformers, so that variables set inside are unknown outside.
    """

    tags = {"generation"}  # noqa: RUF012 (an instance variable to Jinja)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _compile(source: str) -> Template:
    # The same environment as Transformers' chat_template_utils, so that templates render alike.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
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
