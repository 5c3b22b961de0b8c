"""Templates in the families' styles, named ones and their files: as Transformers renders them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deploy.chat_files import load_chat_templates
from deploy.demo import nano_checkpoint
from deploy.openai_errors import ApiError
from tests.deploy.family_templates import CHATS, FAMILY_TEMPLATES, WEATHER

DOCUMENTS = [{"title": "t&t", "text": "<x>"}, {"title": "", "text": "ü"}]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"tools": [WEATHER, WEATHER]},
    {"documents": DOCUMENTS},
    {"tools": [WEATHER], "documents": DOCUMENTS, "add_generation_prompt": False},
    {"variables": {"enable_thinking": False, "use_default_prompt": False}},
    {"variables": {"bos_token": "<B>", "eos_token": "<E>"}},
    {"continue_final_message": True, "add_generation_prompt": False},
]


def folder_with(path: Path, **files: str) -> Path:
    """A checkpoint folder with a tokenizer, and templates only where `files` put them."""
    shutil.copytree(
        nano_checkpoint("nano-jamba"),
        path,
        ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"),
        dirs_exist_ok=True,
    )
    for name, text in files.items():
        file = path / name.replace("__", "/").replace("_jinja", ".jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return path


def theirs(folder: Path, chat: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    variables = options.pop("variables", {})
    # Transformers asks for a generation prompt only when told to.
    options.setdefault("add_generation_prompt", True)
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options, **variables)
    assert isinstance(text, str)
    return text


def outcome(call: Any, *args: Any, **options: Any) -> str:
    try:
        return str(call(*args, **options))
    except Exception:
        return "refused"


@pytest.mark.parametrize("family", FAMILY_TEMPLATES)
def test_every_feature_of_the_families_templates(family: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template_jinja=FAMILY_TEMPLATES[family])
    templates, warnings = load_chat_templates(folder)
    assert not warnings
    rendered = 0
    for (name, chat), options in itertools.product(CHATS.items(), OPTIONS):
        ours = outcome(templates.render, chat, **options)
        assert ours == outcome(theirs, folder, chat, **options), (name, options)
        rendered += ours != "refused"
    assert rendered >= len(OPTIONS)


def test_the_template_for_tools_is_chosen_by_transformers_rule(tmp_path: Path) -> None:
    named = {"default": "D", "tool_use": "T{{ tools | length }}", "rag": "R"}
    as_list = [{"name": name, "template": text} for name, text in named.items()]
    in_config = folder_with(tmp_path / "config")
    config = json.loads((in_config / "tokenizer_config.json").read_text())
    (in_config / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": as_list})
    )
    in_files = folder_with(
        tmp_path / "files",
        chat_template_jinja="D",
        additional_chat_templates__tool_use_jinja=named["tool_use"],
        additional_chat_templates__rag_jinja="R",
    )
    for folder in (in_config, in_files):
        templates, warnings = load_chat_templates(folder)
        assert not warnings
        assert templates.names == ["default", "rag", "tool_use"]
        for tools in (None, [], [WEATHER]):
            assert templates.render(CHATS["one"], tools=tools) == theirs(
                folder, CHATS["one"], tools=tools
            )
        chosen = templates.named("rag")
        assert chosen is not None
        assert chosen.render(CHATS["one"]) == theirs(folder, CHATS["one"], chat_template="rag")


def test_files_come_before_the_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, additional_chat_templates__rag_jinja="R")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "C"}))
    templates, [warning] = load_chat_templates(folder)
    assert "rag" in warning
    for tools in (None, [WEATHER]):
        assert outcome(templates.render, CHATS["one"], tools=tools) == "refused"
        assert outcome(theirs, folder, CHATS["one"], tools=tools) == "refused"
    with pytest.raises(ApiError, match=r"no default one; allowed values: rag"):
        templates.render(CHATS["one"])


def test_an_empty_folder_and_a_given_template(tmp_path: Path) -> None:
    templates, [warning] = load_chat_templates(tmp_path)
    assert "no chat template" in warning
    assert not templates.names
    folder = folder_with(tmp_path / "jamba", chat_template_jinja="X")
    templates, warnings = load_chat_templates(folder, "{{ bos_token }}G")
    assert not warnings
    assert templates.render(CHATS["one"]) == "<|startoftext|>G"
