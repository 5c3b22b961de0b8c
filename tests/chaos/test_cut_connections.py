"""A connection breaks, in the middle of a frame or idle, while nobody dies: streams still go on.

Nothing else is asked, so that no other step finds out in its place.
"""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest

from benchmarks.faults.injector import is_whole
from benchmarks.faults.instances import Instance, subprocess_instance
from benchmarks.faults.kinds import Link
from benchmarks.faults.wire import Wire
from router.step import SamplingParams
from tests.groups import Answer, answer_of, ask

PROMPT = (5, 6, 7, 8)
SAMPLING = SamplingParams(max_tokens=40, temperature=0.0, logprobs=1)
LINKS = {
    "actor": [
        ("engine-0", "stage-0"),
        ("stage-0", "stage-1"),
        ("stage-1", "engine-0"),
        ("stage-1", "dispatcher-0"),
        ("dispatcher-0", "expert-1"),
    ],
    "direct": [("stage-0", "stage-1"), ("stage-1", "expert-1")],
}


async def _answer(instance: Instance, wire: Wire, link: Link) -> Answer:
    """The answer of a stream in whose middle `link` is cut."""
    tokens = []
    async for token in instance.group.generate(PROMPT, SAMPLING):
        tokens.append(token)
        if len(tokens) == 5:
            assert await asyncio.to_thread(wire.cut, link) == 1, link
    return answer_of(tokens)


async def _used_again(instance: Instance, wire: Wire, link: Link) -> None:
    """Wait until everything is as it was before."""
    while not is_whole(instance.group) or link not in await asyncio.to_thread(wire.links):
        await asyncio.sleep(0.01)


async def _all_broken(instance: Instance, wire: Wire, links: list[Link]) -> None:
    expected = await ask(instance.group, PROMPT, SAMPLING)
    for link in links:
        async with asyncio.timeout(20):
            assert await _answer(instance, wire, link) == expected, f"cut {link}"
            await _used_again(instance, wire, link)
        assert await asyncio.to_thread(wire.reset, link) == 1, link
        # Long enough to be noticed by whoever notices it.
        await asyncio.sleep(0.2)
        async with asyncio.timeout(20):
            assert await ask(instance.group, PROMPT, SAMPLING) == expected, f"reset {link}"
            await _used_again(instance, wire, link)


@pytest.mark.parametrize("dispatch", ["actor", "direct"])
def test_a_lone_stream_goes_on(dispatch: str) -> None:
    layout = {"model": "nano-dbrx", "stages": 2, "expert_shards": 2, "dispatch": dispatch}
    with closing(Wire("unix")) as wire, subprocess_instance(layout, wire) as instance:
        asyncio.run(_all_broken(instance, wire, LINKS[dispatch]))
