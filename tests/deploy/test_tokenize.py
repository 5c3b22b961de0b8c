"""/tokenize and /detokenize against Transformers' tokenizer of the same folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.served_model import load_served_model
from deploy.tokenizer import load_tokenizer
from tests.deploy.conftest import MAX_MODEL_LEN, load_nano
from tests.deploy.family_templates import JAMBA, WEATHER
from tests.deploy.http_client import is_openai_error, post

MakeApi = Callable[..., Any]
TEXTS = ["What is 20 + 15?", " two  spaces ", "ünï😀\n", "", "a<|eom|><|im_end|>b"]
CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "So"}]


@pytest.mark.parametrize("name", NANO_MODELS)
async def test_a_prompt_there_and_back(make_api: MakeApi, name: str) -> None:
    api = make_api(model=load_nano(name))
    theirs = AutoTokenizer.from_pretrained(nano_checkpoint(name))
    for text in TEXTS:
        for special in (True, False):
            body = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
            reply = (await post(api, "/tokenize", body)).json()
            ids = theirs.encode(text, add_special_tokens=special)
            assert reply == {
                "count": len(ids),
                "max_model_len": MAX_MODEL_LEN,
                "tokens": ids,
                "token_strs": theirs.convert_ids_to_tokens(ids),
            }
        reply = (await post(api, "/tokenize", {"prompt": text})).json()
        assert reply["tokens"] == theirs.encode(text)
        assert reply["token_strs"] is None
        back = (await post(api, "/detokenize", {"tokens": reply["tokens"]})).json()
        assert back == {"prompt": theirs.decode(reply["tokens"], skip_special_tokens=False)}


@pytest.mark.parametrize("name", NANO_MODELS)
async def test_a_chat_gives_the_prompt_that_is_generated_from(make_api: MakeApi, name: str) -> None:
    api = make_api(model=load_nano(name))
    theirs = AutoTokenizer.from_pretrained(nano_checkpoint(name))
    for options in (
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        body = {"messages": CHAT, **options}
        tokens = (await post(api, "/tokenize", body)).json()["tokens"]
        asked = {"add_generation_prompt": True, **options}
        assert tokens == theirs.apply_chat_template(CHAT, return_dict=False, **asked)
        reply = await post(api, "/v1/chat/completions", {**body, "max_tokens": 1})
        assert reply.status_code == 200, reply.text
        assert list(api.client.prompts.pop()) == tokens


async def test_tools_and_templates_reach_the_chat(make_api: MakeApi, tmp_path: Path) -> None:
    leave = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(nano_checkpoint("nano-jamba"), tmp_path, ignore=leave, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("D{{ x }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(JAMBA)
    model = load_served_model("m", str(tmp_path), 512, MAX_MODEL_LEN)
    api = make_api(model=model)

    async def text_of(**body: Any) -> str:
        tokens = (await post(api, "/tokenize", {"messages": CHAT, **body})).json()["tokens"]
        return str((await post(api, "/detokenize", {"tokens": tokens})).json()["prompt"])

    assert await text_of() == "D"
    assert await text_of(chat_template_kwargs={"x": 5}) == "D5"
    assert "<tool_definitions>" in await text_of(tools=[WEATHER])
    assert "<|bom|>" in await text_of(chat_template="tool_use")
    refused = await post(api, "/tokenize", {"messages": CHAT, "chat_template": "{{ 1 }}"})
    assert refused.json()["error"]["code"] == "chat_template_not_trusted"
    assert "default, tool_use" in refused.json()["error"]["message"]
    api = make_api(model=replace(model, trust_request_chat_template=True))
    assert await text_of(chat_template="own{{ messages | length }}") == "own2"
    broken = await post(api, "/tokenize", {"messages": CHAT, "chat_template": "a\n{% if %}"})
    error = broken.json()["error"]
    assert (error["param"], error["code"]) == ("chat_template", "chat_template_error")
    assert "line 2" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "messages"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"messages": CHAT, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens"),
    ],
)
async def test_bad_requests_name_the_field(
    make_api: MakeApi, path: str, body: dict[str, Any], param: str
) -> None:
    response = await post(make_api(), path, body)
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert is_openai_error(response.json())
    assert response.json()["error"]["param"] == param


async def test_without_a_tokenizer(make_api: MakeApi, nano_jamba: Any) -> None:
    api = make_api(ids=[5], model=replace(nano_jamba, tokenizer=None, template=None))
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": CHAT}),
        ("/detokenize", {"tokens": [5]}),
    ):
        response = await post(api, path, body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "tokenizer_missing"


def test_tiktoken_ranks_spell_tokens_as_the_tokenizer_json(tmp_path: Path) -> None:
    folder = nano_checkpoint("nano-dbrx")
    leave = shutil.ignore_patterns("*.safetensors", "tokenizer.json")
    shutil.copytree(folder, tmp_path, ignore=leave, dirs_exist_ok=True)
    whole, _ = load_tokenizer(folder)
    own, _ = load_tokenizer(tmp_path)
    assert whole is not None
    assert own is not None
    assert type(whole) is not type(own)
    assert [own.token_text(i) for i in range(520)] == [whole.token_text(i) for i in range(520)]
