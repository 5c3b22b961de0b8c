"""Chat templates against Transformers' own rendering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deploy.chat import ChatTemplate, ChatTemplateError
from deploy.chat_files import load_chat_templates
from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.openai_errors import ApiError

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "S "}, {"role": "user", "content": " x\n\ny "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "ünï😀"},
    ],
]
BLOCKS = """{% for m in messages %}
  {% if m.role == 'skip' %}{% continue %}{% endif %}
    {{ m | tojson }}
{% endfor %}
{% if documents %}{{ documents | tojson(indent=2) }}{% endif %}
{{ bos_token }}{{ strftime_now('%Y') }}
"""


def theirs(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    [text], _ = render_jinja_template([messages], chat_template=source, **kwargs)
    return str(text)


@pytest.mark.parametrize("name", NANO_MODELS)
@pytest.mark.parametrize("chat", CHATS)
def test_nano_templates(name: str, chat: list[dict[str, Any]]) -> None:
    folder = nano_checkpoint(name)
    template, warnings = load_chat_templates(folder)
    assert not warnings
    source = (folder / "chat_template.jinja").read_text()
    bos = json.loads((folder / "tokenizer_config.json").read_text())["bos_token"]
    for generate in (True, False):
        assert template.render(chat, add_generation_prompt=generate) == theirs(
            source, chat, add_generation_prompt=generate, bos_token=bos
        )
    if chat[-1]["role"] == "user" and len(chat) > 1:
        continued = template.render(chat, add_generation_prompt=False, continue_final_message=True)
        assert continued == theirs(source, chat, continue_final_message=True, bos_token=bos)


def test_blocks_filters_and_variables() -> None:
    chat = [*CHATS[2], {"role": "skip", "content": "<b>"}, {"role": "user", "content": "<é>"}]
    documents = [{"title": "t", "text": "<x>"}]
    ours = ChatTemplate(BLOCKS, {"bos_token": "<s>"}).render(chat, documents=documents)
    assert ours == theirs(
        BLOCKS, chat, documents=documents, bos_token="<s>", add_generation_prompt=True
    )


@pytest.mark.parametrize("content", [" spaced ", "plain", "line\n"])
@pytest.mark.parametrize("body", ["{{ m.content }}", "{{ m.content | trim }}"])
def test_continue_final_message(content: str, body: str) -> None:
    source = "{% for m in messages %}[" + body + "]{% endfor %}"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    template = ChatTemplate(source, {})
    ours = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert ours == theirs(source, chat, continue_final_message=True)


def test_template_errors_are_the_callers() -> None:
    for source in (
        "{{ raise_exception('only user turns') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
    ):
        with pytest.raises(ApiError) as error:
            ChatTemplate(source, {}).render(CHATS[0])
        assert error.value.status == 400
        assert error.value.param == "messages"


def test_where_templates_are_found(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for value, expected in (("C", "C"), (named, "D")):
        config.write_text(json.dumps({"chat_template": value}))
        template, _ = load_chat_templates(tmp_path)
        assert template.render(CHATS[0]) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}J")
    config.write_text(json.dumps({"chat_template": "C", "eos_token": {"content": "</s>"}}))
    template, _ = load_chat_templates(tmp_path)
    assert template.render(CHATS[0]) == "</s>J"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ChatTemplateError):
        load_chat_templates(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
        "a\n  {%- generation -%}\n {{ messages[0].content }} \n{%- endgeneration -%}\n b",
        "{% set x = 1 %}{% generation %}\n{% set x = 2 %}{{ x }}{% endgeneration %}\n{{ x }}",
        "{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}",
    ],
)
def test_generation_blocks_are_transparent(source: str) -> None:
    for chat in CHATS:
        ours = ChatTemplate(source, {}).render(chat, add_generation_prompt=False)
        assert ours == theirs(source, chat)


# Jinja's own errors, one of Python's compiler and one of its parser.
@pytest.mark.parametrize(
    "source", ["{% if %}", "{% generation %}", "{% break %}", "{{ " + "(" * 50_000]
)
def test_templates_that_do_not_compile_name_their_file(tmp_path: Path, source: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json: .*does not compile"):
        load_chat_templates(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja: .*does not compile"):
        load_chat_templates(tmp_path)


def test_a_template_that_is_not_utf8_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja: .*not UTF-8"):
        load_chat_templates(tmp_path)


@pytest.mark.parametrize(
    "value", [["x"], [None], 5, True, {"default": "x"}, [{"name": "default", "template": 5}]]
)
def test_templates_of_another_shape_are_named(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json: chat_template must be"):
        load_chat_templates(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{"])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: "):
        load_chat_templates(tmp_path)


def test_names_of_templates_may_be_anything(tmp_path: Path) -> None:
    named = [{"name": ["x"], "template": 5}, {"name": "default", "template": "D"}, {}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template, _ = load_chat_templates(tmp_path)
    assert template.render(CHATS[0]) == "D"
