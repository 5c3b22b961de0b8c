"""A connection breaks with a frame on it while both of its ends live: the step is done again."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from router.step import SamplingParams
from router.transport.base import Frame, FrameKind, Transport
from shards.spec import WorkerSpec
from shards.worker import RunsForever, make_worker
from tests.groups import ask_all, running_group

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, logprobs=1)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30)]


@pytest.mark.parametrize(
    ("sender", "kind", "target"),
    [
        ("engine-0", FrameKind.STEP, "stage-0"),
        ("stage-0", FrameKind.STEP, "stage-1"),
        ("stage-1", FrameKind.RESULT, "engine-0"),
        ("stage-0", FrameKind.MOE_CALL, "dispatcher-0"),
        ("dispatcher-0", FrameKind.MOE_RESULT, "stage-1"),
        ("dispatcher-0", FrameKind.EXPERT_CALL, "expert-1"),
        ("expert-1", FrameKind.EXPERT_RESULT, "dispatcher-0"),
        ("stage-1", FrameKind.EXPERT_CALL, "expert-0"),
        ("expert-0", FrameKind.EXPERT_RESULT, "stage-0"),
        ("dispatcher-0", FrameKind.TABLE, "stage-0"),
    ],
)
async def test_a_frame_is_lost_with_its_connection(
    sender: str, kind: FrameKind, target: str
) -> None:
    sent = itertools.count()
    at = 0 if kind is FrameKind.TABLE else 7
    on_actor = "dispatcher-0" in (sender, target) and kind is not FrameKind.TABLE
    options: dict[str, Any] = {
        "stages": 2,
        "expert_shards": 2,
        "dispatch": "actor" if on_actor else "direct",
    }

    def make(spec: WorkerSpec, transport: Transport) -> RunsForever:
        send = transport.send

        def send_or_break(peer: str, frame: Frame) -> None:
            links = list(transport._links.get(peer, ()))  # type: ignore[attr-defined]
            if links and frame.header.kind is kind and peer == target and next(sent) == at:
                for link in links:
                    transport._drop(link, "broken by the test")  # type: ignore[attr-defined]
                return
            send(peer, frame)

        if spec.peer == sender:
            transport.send = send_or_break  # type: ignore[method-assign]
        return make_worker(spec, transport)

    with running_group("nano-jamba", **options) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
    with running_group("nano-jamba", make=make, **options) as group:
        assert await asyncio.wait_for(ask_all(group, PROMPTS, GREEDY), 30) == expected
        assert next(sent) > at, "it was sent, and more after it"
        assert sum(w.deaths for w in group.workers()) == 0
