"""Options and request fields that choose a chat template or are given to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.chat import ChatTemplate, ChatTemplates
from deploy.config import ConfigError, parse_args
from deploy.resolve import resolve
from deploy.served_model import ServedModel, load_served_model
from tests.deploy.conftest import load_nano
from tests.deploy.http_client import post

MakeApi = Callable[..., Any]
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def with_template(source: str) -> ServedModel:
    templates = ChatTemplates({"default": ChatTemplate(source, {})}, {})
    return replace(load_nano("nano-jamba"), template=templates)


async def prompt_of(make_api: MakeApi, source: str, **body: Any) -> tuple[str, list[str]]:
    api = make_api(model=with_template(source))
    response = await post(api, CHAT, {"messages": USER, **body})
    assert response.status_code == 200, response.text
    text = api.model.tokenizer.decode(api.client.prompts.pop(), skip_special_tokens=False)
    return text, response.json().get("warnings", [])


async def test_reasoning_effort_reaches_templates_that_read_it(make_api: MakeApi) -> None:
    source = "{% if reasoning_effort %}{{ reasoning_effort }}{% else %}none{% endif %}"
    assert await prompt_of(make_api, source) == ("none", [])
    assert await prompt_of(make_api, source, reasoning_effort="high") == ("high", [])
    given = {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "own"}}
    assert await prompt_of(make_api, source, **given) == ("own", [])


async def test_variables_are_warned_about_only_where_nothing_reads_them(make_api: MakeApi) -> None:
    source = "{{ a }}{% for d in documents or [] %}{{ d.text }}{% endfor %}x"
    body = {"chat_template_kwargs": {"a": "A", "b": "B"}, "documents": [{"text": "D"}]}
    text, [warning] = await prompt_of(make_api, source, **body)
    assert text == "ADx"
    assert warning.startswith("chat_template_kwargs.b has no effect")


async def test_developers_are_the_system_to_templates_without_them(make_api: MakeApi) -> None:
    messages = [{"role": "developer", "content": "a"}, *USER]
    roles = "{% for m in messages %}{{ m.role }},{% endfor %}"
    assert (await prompt_of(make_api, roles, messages=messages))[0] == "system,user,"
    knowing = "{% if messages[0].role == 'developer' %}known {% endif %}" + roles
    text, _ = await prompt_of(make_api, knowing, messages=messages)
    assert text == "known developer,user,"


@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_template_raises_is_a_bad_request(make_api: MakeApi, stream: bool) -> None:
    api = make_api(model=with_template("a\n{{ raise_exception('turns must alternate') }}"))
    response = await post(api, CHAT, {"messages": USER, "stream": stream})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"]) == ("messages", "chat_template_error")
    assert error["message"].endswith("at line 2: turns must alternate")


def test_the_option_replaces_the_checkpoints_templates(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}own")
    options = {"model": "nano-jamba", "chat_template": str(file)}
    resolved = resolve(parse_args({**options, "trust_request_chat_template": "true"}))
    assert resolved.trust_request_chat_template
    model = load_served_model(
        "m", resolved.model_path, 512, 64, chat_template=resolved.chat_template
    )
    assert model.need_template().render(USER) == "<|startoftext|>own"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"caf\xe9", "not UTF-8"),
        (b"a\n{% if %}", "does not compile at line 2"),
    ],
)
def test_a_bad_option_fails_at_the_start(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^chat_template=.*own\.jinja: .*") as error:
        resolve(parse_args({"model": "nano-jamba", "chat_template": str(file)}))
    assert words in str(error.value)


async def test_a_checkpoint_without_templates_may_run_a_requests_own(
    make_api: MakeApi, tmp_path: Path
) -> None:
    folder = Path(load_nano("nano-jamba").path)
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bodies = ({"messages": USER}, {"messages": USER, "chat_template": "{{ bos_token }}x"})
    outcomes = {}
    for trust in (False, True):
        model = load_served_model("m", str(tmp_path), 512, 64, trust_request_chat_template=trust)
        api = make_api(model=model)
        replies = [await post(api, CHAT, body) for body in bodies]
        outcomes[trust] = [reply.json().get("error", {}).get("code") for reply in replies]
        if trust:
            assert api.client.prompts[0][0] == 1, "the special tokens are known all the same"
    assert outcomes == {
        False: ["chat_template_missing", "chat_template_not_trusted"],
        True: ["chat_template_missing", None],
    }
