"""Tools over HTTP: what reaches the model, what of its answer reaches the client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.demo import nano_checkpoint
from deploy.served_model import ServedModel, load_served_model
from tests.deploy.conftest import say
from tests.deploy.http_client import post
from tests.deploy.tool_checkpoints import MAX_MODEL_LEN, served

MakeApi = Callable[..., Any]
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Of a city.", "parameters": SCHEMA},
}
NOW = {"type": "function", "function": {"name": "now"}}
ARGUMENTS = '{"city": "A\\u00e9 }",  "n": 1.0}'
CALLS = {
    "jamba": f' <tool_calls>[\n    {{"name": "get_weather", "arguments": {ARGUMENTS}}},\n'
    '    {"name": "now", "arguments": {}}\n]</tool_calls>',
    "hermes": f'</think>\n\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n'
    '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "json": f'{{"tool_calls": [{{"name": "get_weather", "arguments": {ARGUMENTS}}}, '
    '{"name": "now", "arguments": {}}]}',
}


def model_of(form: str, folder: Path) -> ServedModel:
    if form == "json":
        path = str(nano_checkpoint("nano-phimoe"))
        return load_served_model("nano-phimoe", path, 512, MAX_MODEL_LEN)
    return served(folder, form)


@pytest.fixture(params=CALLS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(form: str, tmp_path: Path) -> ServedModel:
    return model_of(form, tmp_path)


def scripted(make_api: MakeApi, model: ServedModel, text: str, *, end: bool = True) -> Any:
    return make_api(ids=say(model, text, end=end), model=model)


async def ask(api: Any, **fields: Any) -> dict[str, Any]:
    body = {"messages": USER, "tools": [WEATHER, NOW], **fields}
    response = await post(api, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def chunks_of(api: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": USER, "tools": [WEATHER, NOW], "stream": True, **fields}
    response = await post(api, "/v1/chat/completions", body)
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def prompt_of(api: Any, model: ServedModel) -> str:
    assert model.tokenizer is not None
    text: str = model.tokenizer.decode(api.client.prompts[-1], skip_special_tokens=False)
    return text


def accumulated(chunks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each choice's message, put together as clients do."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in sorted({choice["index"] for choice in choices}):
        message: dict[str, Any] = {"content": None, "reasoning_content": None, "tool_calls": []}
        finish = []
        for choice in choices:
            if choice["index"] != index:
                continue
            finish += [choice["finish_reason"]] if choice["finish_reason"] else []
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                if delta.get(key) is not None:
                    message[key] = (message[key] or "") + delta[key]
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    assert part["index"] == len(message["tool_calls"])
                    assert part["type"] == "function"
                    message["tool_calls"].append({**part, "function": {**part["function"]}})
                else:
                    call = message["tool_calls"][part["index"]]
                    call["function"]["arguments"] += part["function"]["arguments"]
        assert len(finish) == 1
        yield {**message, "finish_reason": finish[0]}


async def test_calls_of_an_answer(make_api: MakeApi, model: ServedModel, form: str) -> None:
    body = await ask(scripted(make_api, model, CALLS[form]))
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["type"] == "function"
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert "warnings" not in body


async def test_a_stream_adds_up_to_the_same(
    make_api: MakeApi, model: ServedModel, form: str
) -> None:
    api = scripted(make_api, model, CALLS[form])
    options = {"include_usage": True}
    chunks = await chunks_of(api, n=2, logprobs=True, top_logprobs=1, stream_options=options)
    first, second = accumulated(chunks)
    for message in (first, second):
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions[0] == {"name": "get_weather", "arguments": ARGUMENTS}
        assert functions[1] == {"name": "now", "arguments": "{}"}
        assert message["finish_reason"] == "tool_calls"
        assert message["content"] is None
    ids = {call["id"] for message in (first, second) for call in message["tool_calls"]}
    assert len(ids) == 4
    # Arguments come in many parts, and every token has its log-probability.
    num_parts = sum("tool_calls" in c["delta"] for chunk in chunks for c in chunk["choices"])
    assert num_parts > 10
    usage = chunks[-1]["usage"]
    rows = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert sum(map(len, rows)) == usage["completion_tokens"]
    assert usage["completion_tokens"] == sum(stream.emitted for stream in api.client.streams)


async def test_text_beside_calls(make_api: MakeApi, model: ServedModel, form: str) -> None:
    text = CALLS[form].replace("</think>\n\n", "</think>\n\nLet me see.\n")
    if text == CALLS[form]:
        text = "Let me see.\n" + text
    body = await ask(scripted(make_api, model, text))
    assert body["choices"][0]["message"]["content"].strip() == "Let me see."
    assert len(body["choices"][0]["message"]["tool_calls"]) == 2


async def test_an_answer_without_calls(make_api: MakeApi, model: ServedModel) -> None:
    body = await ask(scripted(make_api, model, "</think>It is <3 {nice}."))
    message = body["choices"][0]["message"]
    assert message["content"].removeprefix("</think>") == "It is <3 {nice}."
    assert "tool_calls" not in message
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_a_call_that_is_cut(make_api: MakeApi, model: ServedModel, form: str) -> None:
    ids = say(model, CALLS[form])
    for max_tokens in range(1, len(ids)):
        api = make_api(ids=ids, model=model)
        body = await ask(api, max_tokens=max_tokens)
        [streamed] = accumulated(await chunks_of(api, max_tokens=max_tokens))
        [choice] = body["choices"]
        assert choice["finish_reason"] == streamed["finish_reason"] == "length"
        message = choice["message"]
        for call in message.get("tool_calls", ())[:1]:
            assert ARGUMENTS.startswith(call["function"]["arguments"])
        functions = [call["function"] for call in message.get("tool_calls", ())]
        assert [call["function"] for call in streamed["tool_calls"]] == functions
        assert (streamed["content"] or None) == (message["content"] or None)


@pytest.mark.parametrize(
    ("stop", "num_whole"),
    [('"n"', 0), ("1.0", 0), ('"now"', 1), ("</tool_call", 1), ('get_weather"', 0)],
)
async def test_a_stop_string_inside_a_call(
    make_api: MakeApi, model: ServedModel, form: str, stop: str, num_whole: int
) -> None:
    """No call that is cut passes for a whole one: only `tool_calls` says that all of them are."""
    api = scripted(make_api, model, CALLS[form])
    body = await ask(api, stop=stop)
    [streamed] = accumulated(await chunks_of(api, stop=stop))
    [choice] = body["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    assert [call["function"] for call in streamed["tool_calls"]] == calls
    assert (streamed["content"] or None) == (choice["message"]["content"] or None)
    whole = [call for call in calls if _is_json(call["arguments"])]
    assert len(whole) >= num_whole
    expected = "tool_calls" if calls and whole == calls else "stop"
    assert choice["finish_reason"] == streamed["finish_reason"] == expected
    if calls and whole != calls:
        assert ARGUMENTS.startswith(calls[-1]["arguments"])


async def test_a_model_that_ends_inside_a_call(
    make_api: MakeApi, model: ServedModel, form: str
) -> None:
    cut = CALLS[form][: CALLS[form].index('"n"')]
    [choice] = (await ask(scripted(make_api, model, cut)))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    assert choice["finish_reason"] == "stop"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


async def test_one_call_at_most_ends_the_sequence(make_api: MakeApi, model: ServedModel) -> None:
    form = model.tool_call_parser
    ids = say(model, CALLS[form])
    api = make_api(ids=ids, model=model)
    body = await ask(api, parallel_tool_calls=False)
    [call] = body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == ARGUMENTS
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    [stream] = api.client.streams
    assert stream.aborted
    assert body["usage"]["completion_tokens"] < len(ids) - 10


async def test_tools_reach_the_prompt(make_api: MakeApi, model: ServedModel) -> None:
    api = scripted(make_api, model, "</think>ok")
    await ask(api)
    shown = prompt_of(api, model)
    assert json.dumps(WEATHER["function"]) in shown
    await ask(api, tool_choice="none")
    hidden = prompt_of(api, model)
    assert "get_weather" not in hidden
    await ask(api, tool_choice={"type": "function", "function": {"name": "now"}})
    if model.tool_call_parser == "json":
        assert "Call now now." in prompt_of(api, model)


async def test_without_tools_calls_are_text(make_api: MakeApi, tmp_path: Path) -> None:
    model = model_of("json", tmp_path)
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        body = await ask(scripted(make_api, model, CALLS["json"]), **fields)
        assert body["choices"][0]["message"]["content"] == CALLS["json"]
        assert body["choices"][0]["finish_reason"] == "stop"


CONVERSATION = [
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for i, (name, arguments) in enumerate(
                [("get_weather", '{"city":"Rome"}'), ("now", "{")]
            )
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": "warm"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
]


async def test_earlier_calls_and_results_reach_the_prompt(
    make_api: MakeApi, tmp_path: Path
) -> None:
    prompts = {}
    for form in CALLS:
        model = model_of(form, tmp_path)
        api = scripted(make_api, model, "</think>ok")
        await ask(api, messages=CONVERSATION)
        prompts[form] = prompt_of(api, model)
    call = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
    assert f'<tool_calls>[\n{call},\n{{"name": "now", "arguments": {{}}' in prompts["jamba"]
    assert "<|tool|> warm<|eom|><|bom|><|tool|> noon<|eom|>" in prompts["jamba"]
    assert f"<tool_call>\n{call}\n</tool_call>" in prompts["hermes"]
    assert "<tool_response>\nwarm\n</tool_response>" in prompts["hermes"]
    text = f'<|assistant|>\n{{"tool_calls": [{call}, {{"name": "now", "arguments": "{{"}}]}}<|end|>'
    assert text in prompts["json"]
    assert "<|user|>\nResult of get_weather: warm\nResult of now: noon<|end|>" in prompts["json"]
