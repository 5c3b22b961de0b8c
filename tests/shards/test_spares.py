"""Spares: one per node, none while a worker starts, and each taken by one worker at most."""

from __future__ import annotations

import random

from deploy.config import parse_args
from deploy.resolve import resolve
from shards.spares import DEATH_WINDOW_S, MAX_DEATHS, Spares
from shards.spec import WorkerSpec, worker_specs

GROUP = resolve(parse_args({"model": "nano-dbrx", "stages": 2, "expert_shards": 2})).spec
SPECS = worker_specs(GROUP)


class Process:
    """What a launcher started."""


def warm(spares: Spares[Process], node: str) -> Process:
    process = Process()
    assert spares.put(node, process)
    spares.on_warm(process)
    return process


def answered(spares: Spares[Process], spec: WorkerSpec) -> None:
    spares.on_spawn(spec)
    spares.on_answered(spec)


def test_made_only_when_every_worker_has_answered() -> None:
    spares: Spares[Process] = Spares()
    for spec in SPECS:
        spares.on_spawn(spec)
    for spec in SPECS:
        assert spares.wanted(["a", "b"]) == []
        spares.on_answered(spec)
    assert spares.wanted(["b", "a", "a"]) == ["a", "b"]
    assert spares.wanted(["a", "b"]) == [], "they are being made"


def test_a_worker_that_dies_while_it_starts_holds_nothing_up() -> None:
    spares: Spares[Process] = Spares()
    spares.on_spawn(SPECS[0])
    spares.on_died(SPECS[0])
    assert spares.wanted(["a"]) == ["a"]


def test_only_a_warm_one_of_the_same_node_is_taken_and_only_once() -> None:
    spares: Spares[Process] = Spares()
    assert spares.wanted(["a", "b"]) == ["a", "b"]
    cold = Process()
    spares.put("a", cold)
    there = warm(spares, "b")
    assert spares.take("a") is None
    spares.on_warm(cold)
    assert spares.take("c") is None
    assert spares.take("a") is cold
    assert spares.take("a") is None
    assert spares.take("b") is there
    assert not spares.on_ended(cold, 0.0), "it had become a worker"
    assert spares.wanted(["a", "b"]) == ["a", "b"]


def test_what_cannot_be_started_is_tried_again() -> None:
    spares: Spares[Process] = Spares()
    assert spares.wanted(["a"]) == ["a"]
    spares.give_up("a")
    assert spares.wanted(["a"]) == ["a"]


def test_those_that_keep_ending_are_made_again_once_a_worker_has_answered() -> None:
    spares: Spares[Process] = Spares()
    for turn in range(MAX_DEATHS):
        assert spares.wanted(["a"]) == ["a"]
        assert spares.on_ended(warm(spares, "a"), float(turn))
    assert spares.wanted(["a"]) == []
    answered(spares, SPECS[0])
    assert spares.wanted(["a"]) == ["a"]


def test_rare_ends_are_not_added_up() -> None:
    spares: Spares[Process] = Spares()
    for turn in range(4 * MAX_DEATHS):
        assert spares.wanted(["a"]) == ["a"]
        assert spares.on_ended(warm(spares, "a"), turn * DEATH_WINDOW_S)


def test_after_the_end_nothing_is_made_or_taken() -> None:
    spares: Spares[Process] = Spares()
    assert spares.wanted(["a", "b"]) == ["a", "b"]
    waiting = warm(spares, "a")
    assert spares.close() == [waiting]
    assert not spares.put("b", Process()), "its launcher must end it"
    assert spares.take("a") is None
    assert spares.wanted(["c"]) == []
    assert spares.on_ended(waiting, 0.0)


def test_against_a_list_of_what_happened() -> None:
    """Random events beside the plainest bookkeeping: which process is whose, and in what state."""
    rng = random.Random(5)
    for _ in range(60):
        spares: Spares[Process] = Spares()
        state: dict[str, tuple[Process | None, str]] = {}
        starting: set[WorkerSpec] = set()
        for now in range(120):
            node, spec = rng.choice("abc"), rng.choice(SPECS)
            process, phase = state.get(node, (None, "none"))
            match rng.randrange(8):
                case 0:
                    spares.on_spawn(spec)
                    starting.add(spec)
                case 1 | 2:
                    spares.on_answered(spec)
                    starting.discard(spec)
                case 3:
                    expected = [] if starting else sorted({"a", "b", "c"} - state.keys())
                    assert spares.wanted("abc") == expected
                    state |= dict.fromkeys(expected, (None, "wanted"))
                case 4 if phase == "wanted":
                    state[node] = (Process(), "cold")
                    assert spares.put(node, state[node][0])
                case 5 if phase == "cold":
                    spares.on_warm(process)
                    state[node] = (process, "warm")
                case 6:
                    assert spares.take(node) is (process if phase == "warm" else None)
                    if phase == "warm":
                        del state[node]
                case 7 if process is not None:
                    assert spares.on_ended(process, now * DEATH_WINDOW_S)
                    assert not spares.on_ended(process, now * DEATH_WINDOW_S)
                    del state[node]
            spares.check_invariants()
