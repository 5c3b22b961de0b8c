"""A request that kills the stage that computes it, again and again: it fails, the others do not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from router.step import SamplingParams
from shards.client import WorkerKilled
from tests.groups import ask, ask_all, healed, running_group

POISON_TOKEN = 499
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, logprobs=1)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30)]
FOLDER = Path(__file__).parent / "poison"


@pytest.mark.parametrize("options", [{"stages": 2, "expert_shards": 2}, {"executor": "local"}])
async def test_it_fails_alone(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with running_group("nano-jamba", **options) as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", os.getcwd())])
    monkeypatch.setenv("PYTHONPATH", paths)
    with running_group("nano-jamba", processes=True, **options) as group:
        asked = asyncio.gather(ask_all(group, PROMPTS, GREEDY), ask_all(group, PROMPTS, GREEDY))
        poisoned = asyncio.create_task(ask(group, (9, POISON_TOKEN, 8), GREEDY))
        async with asyncio.timeout(120):
            with pytest.raises(WorkerKilled):
                await poisoned
            assert await asked == [expected, expected]
        await healed(group)
        deaths = {f"{w.role}-{w.index}": w.deaths for w in group.workers() if w.deaths}
        assert list(deaths) == ["engine-0" if "executor" in options else "stage-0"]
        assert sum(deaths.values()) <= 2 + 3
        assert await ask_all(group, PROMPTS, GREEDY) == expected
