"""Settings that a running replica takes over: whole, checked, and by no request half-way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from deploy.config import ConfigError
from deploy.live_settings import LiveSettings
from deploy.user_config import changed_model, parse_user_config
from shards.cores import available_cores
from tests.deploy.conftest import Api, load_nano
from tests.deploy.http_client import client_of, post

MakeApi = Callable[..., Api]
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def version_of(api: Api) -> dict[str, Any]:
    async with client_of(api.app()) as client:
        return dict((await client.get("/version")).json())


def last_prompt(api: Api) -> str:
    assert api.model.tokenizer is not None
    return api.model.tokenizer.decode(api.client.prompts[-1], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, r"allowed is a mapping of temperature, .*chat_template"),
        ({"temperatur": 1}, r"unknown option temperatur: allowed options are temperature, top_p"),
        ({"temperature": 2.5}, r"temperature=2\.5: allowed values are 2\.0? or less"),
        ({"temperature": "1"}, r"temperature=1: allowed values are numbers"),
        ({"temperature": True}, r"temperature=True: allowed values are numbers"),
        ({"top_p": 0}, r"top_p=0(\.0)?: allowed values are more than 0"),
        ({"top_k": 1.5}, r"top_k=1\.5: "),
        ({"min_p": float("nan")}, r"min_p=nan: allowed values are numbers that are finite"),
        ({"repetition_penalty": 0}, r"repetition_penalty=0(\.0)?: allowed values are 0\.01 or mo"),
        ({"max_waiting_seqs": -1}, r"max_waiting_seqs=-1: allowed values are 0 or more"),
        ({"max_queue_seconds": 0}, r"max_queue_seconds=0(\.0)?: allowed values are more than 0"),
        ({"chat_template": 5}, r"chat_template=5: "),
        ({"chat_template": "{% if %}"}, r"chat_template: the chat template does not compile"),
    ],
)
def test_a_bad_one_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^user_config: .*{message.removeprefix('user_config: ')}"
    ):
        changed_model(parse_user_config(value), load_nano("nano-jamba"))


async def test_sampling_defaults_change_and_return(make_api: MakeApi) -> None:
    api = make_api()
    live = LiveSettings(api.service)

    async def sampled(**body: Any) -> tuple[float, float, int]:
        assert (await post(api, CHAT, {**BODY, **body})).status_code == 200
        sampling = api.client.streams[-1].sampling
        return sampling.temperature, sampling.top_p, sampling.top_k

    before = await sampled()
    await live.change({"temperature": 0.25, "top_k": 3})
    assert await sampled() == (0.25, before[1], 3)
    assert await sampled(temperature=1.5, top_k=0) == (1.5, before[1], 0)
    # Each is laid over the options, not over the one before.
    await live.change({"top_p": 0.5})
    assert await sampled() == (before[0], 0.5, before[2])
    await live.change({})
    assert await sampled() == before


async def test_the_template_changes_and_its_special_tokens_are_known(make_api: MakeApi) -> None:
    api = make_api()
    live = LiveSettings(api.service)
    await post(api, CHAT, BODY)
    own = last_prompt(api)
    await live.change({"chat_template": "{{ bos_token }}{{ messages[0].content }}!"})
    await post(api, CHAT, BODY)
    assert last_prompt(api).endswith("Hi!")
    assert len(last_prompt(api)) > len("Hi!")
    await live.change({})
    await post(api, CHAT, BODY)
    assert last_prompt(api) == own


async def test_admission_limits_change(make_api: MakeApi) -> None:
    api = make_api(max_num_seqs=1, delay=0.05)
    live = LiveSettings(api.service)
    await live.change({"max_waiting_seqs": 1})
    assert (await post(api, CHAT, {**BODY, "n": 3})).status_code == 400
    assert (await post(api, CHAT, {**BODY, "n": 2})).status_code == 200
    await live.change({"max_waiting_seqs": 2})
    assert (await post(api, CHAT, {**BODY, "n": 3})).status_code == 200


async def test_a_bad_one_leaves_what_is_in_force_and_says_so(
    make_api: MakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api = make_api()
    live = LiveSettings(api.service)
    assert "user_config" not in await version_of(api)
    await live.change({"temperature": 0.25})
    await live.change({"temperature": 0.5, "top_p": 7})
    await post(api, CHAT, BODY)
    assert api.client.streams[-1].sampling.temperature == 0.25
    version = await version_of(api)
    assert version["user_config"] == {"temperature": 0.25}
    assert "top_p=7" in version["user_config_refused"]
    assert "top_p=7" in caplog.text
    await live.change({"temperature": 0.75, "chat_template": "{{ messages[0].content }}"})
    version = await version_of(api)
    assert "user_config_refused" not in version
    assert version["user_config"]["chat_template"].startswith("sha256:")


async def test_a_request_under_way_sees_one_configuration(make_api: MakeApi) -> None:
    api = make_api()
    live = LiveSettings(api.service)
    await live.change({"temperature": 0.25, "chat_template": "old{{ messages[0].content }}"})
    held = threading.Event()
    waits = (api.service._text.run(1, held.wait) for _ in range(available_cores() + 8))
    threads = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.sleep(0)
    request = asyncio.ensure_future(post(api, CHAT, BODY))
    await asyncio.sleep(0.2)  # its prompt waits for a thread
    assert not request.done()
    await live.change({"temperature": 0.75, "chat_template": "new{{ messages[0].content }}"})
    held.set()
    assert (await request).status_code == 200
    await asyncio.gather(*threads)
    assert last_prompt(api).startswith("old")
    assert api.client.streams[-1].sampling.temperature == 0.25
    await post(api, CHAT, BODY)
    assert last_prompt(api).startswith("new")
    assert api.client.streams[-1].sampling.temperature == 0.75
