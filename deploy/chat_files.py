"""Where a checkpoint keeps its chat templates: the files and names that Transformers knows."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.chat import DEFAULT, ChatTemplate, ChatTemplateError, ChatTemplates
from deploy.json_file import read_json_object

_SINGLE_FILE = "chat_template.jinja"
_MORE_FILES = "additional_chat_templates"
_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load_chat_templates(folder: Path, given: str | None = None) -> tuple[ChatTemplates, list[str]]:
    """The folder's templates, or the text `given` instead; and warnings.

    chat_template.jinja and additional_chat_templates/*.jinja come before what is written in
    tokenizer_config.json. Raises ValueError naming the file: ChatTemplateError where a template
    is at fault.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    tokens = _token_texts(read_json_object(folder / "special_tokens_map.json") | config)
    if given is not None:
        return ChatTemplates({DEFAULT: ChatTemplate(given, tokens)}, tokens), []
    sources = _from_files(folder) or _from_config(folder, config)
    templates = ChatTemplates(
        {name: _compiled(file, text, tokens) for name, (file, text) in sources.items()}, tokens
    )
    if DEFAULT in templates.names:
        return templates, []
    if not templates.names:
        return templates, ["no chat template: chat completions are refused"]
    names = ", ".join(templates.names)
    return templates, [f"no default chat template: requests have to choose among {names}"]


def read_template(file: Path) -> str:
    """A template's text. Raises ChatTemplateError naming the file."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ChatTemplateError(f"{file}: the chat template is not UTF-8: {error}") from error


def _compiled(file: Path, source: str, tokens: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(source, tokens)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{file}: {error}") from error


def _from_files(folder: Path) -> dict[str, tuple[Path, str]]:
    files = {
        file.name.removesuffix(".jinja"): file for file in (folder / _MORE_FILES).glob("*.jinja")
    }
    if (folder / _SINGLE_FILE).is_file():
        files.setdefault(DEFAULT, folder / _SINGLE_FILE)
    return {name: (file, read_template(file)) for name, file in files.items()}


def _from_config(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """From `chat_template`: one text, or several by name."""
    file = folder / "tokenizer_config.json"
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {e["name"]: e.get("template") for e in value if isinstance(e.get("name"), str)}
    else:
        named = {} if value is None else {DEFAULT: value}
    for template in named.values():
        if not isinstance(template, str):
            raise ChatTemplateError(
                f"{file}: chat_template must be a text or a list of objects with a `name` and a "
                f"`template`, not {reprlib.repr(value)}"
            )
    return {name: (file, template) for name, template in named.items()}


def _token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name in _TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


def given_template(file: str | None) -> str | None:
    """The text of the file that --chat-template names. Raises ValueError or OSError."""
    if file is None:
        return None
    source = read_template(Path(file).expanduser())
    ChatTemplate(source, {})
    return source
