"""What a replica reports, what Serve makes of it, and the deployment that the options ask for."""

from __future__ import annotations

import base64
import subprocess
import sys
from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.admission import Admission, AdmissionLimits, Work
from deploy.app import application
from deploy.autoscaling import WorkPolicy, autoscaling_config, replica_loads
from deploy.config import ConfigError, parse_args
from deploy.load_report import LoadReporter
from deploy.openai_errors import ApiError
from deploy.resolve import resolve
from deploy.scaling_policy import ReplicaLoad, ScalingTargets
from router.step import EngineLoad

IDLE = EngineLoad()


def admission(seats: int = 4, waiting: int = 4) -> Admission:
    return Admission(AdmissionLimits(num_seats=seats, max_waiting=waiting, block_size=10))


def serve_one(policy: Admission, begin: float, prompt: int, answer: int, token_s: float) -> float:
    [ticket] = policy.begin([Work(prompt_tokens=prompt, max_tokens=99)], begin)
    first = begin + prompt * 0.01
    policy.first_token(ticket, first)
    ticket.emitted = answer
    policy.end(ticket, first + (answer - 1) * token_s)
    return first + (answer - 1) * token_s


def test_rates_are_those_since_the_last_report() -> None:
    policy = admission()
    reporter = LoadReporter(policy, startup_s=7.0, now=0.0)
    assert reporter.report(2.0, IDLE) == ReplicaLoad(
        seats=4,
        sequences=0,
        arrivals=0,
        departures=0,
        residence=0,
        prefill=0,
        backlog_s=0,
        oldest_wait_s=0,
        memory=0,
        startup_s=7.0,
    )
    for _ in range(4):
        serve_one(policy, 2.0, prompt=20, answer=11, token_s=0.02)
    policy.begin([Work(prompt_tokens=30, max_tokens=9), Work(prompt_tokens=50, max_tokens=9)], 5.0)
    load = reporter.report(6.0, EngineLoad(used_blocks=30, total_blocks=40, total_slots=4))
    assert (load.sequences, load.arrivals, load.departures) == (2, 6 / 4, 1)
    assert load.residence == pytest.approx(10 * 0.02)
    per_token_s = policy.rates.prefill_s_per_token
    assert load.prefill == pytest.approx((4 * 20 + 80) / 4 * per_token_s)
    assert load.backlog_s == pytest.approx(80 * per_token_s)
    assert load.oldest_wait_s == 1.0
    assert load.memory == 0.75
    assert reporter.report(10.0, IDLE).arrivals == 0


def test_who_was_sent_away_was_offered() -> None:
    policy = admission()
    reporter = LoadReporter(policy, startup_s=0.0, now=0.0)
    work = Work(prompt_tokens=10, max_tokens=9)
    policy.begin([work] * 8, 0.0)
    for _ in range(12):
        with pytest.raises(ApiError):
            policy.check([work], 1.0, IDLE)
    load = reporter.report(10.0, IDLE)
    assert load.arrivals == pytest.approx(2.0)
    assert load.sequences == 8


def test_a_request_that_can_never_be_served_is_no_load() -> None:
    policy = admission()
    with pytest.raises(ApiError):
        policy.check([Work(prompt_tokens=1, max_tokens=1)] * 9, 0.0, IDLE)
    assert policy.num_offered == 0


def test_two_reports_at_once_have_the_same_rates() -> None:
    policy = admission()
    reporter = LoadReporter(policy, startup_s=0.0, now=0.0)
    policy.begin([Work(prompt_tokens=10, max_tokens=9)] * 4, 0.0)
    first = reporter.report(2.0, IDLE)
    assert reporter.report(2.0, IDLE).arrivals == first.arrivals == 2.0


def test_memory_bounds_the_seats() -> None:
    policy = admission(seats=16)
    reporter = LoadReporter(policy, startup_s=0.0, now=0.0)
    for turn in range(50):
        serve_one(policy, turn * 10.0, prompt=60, answer=40, token_s=0.01)
    # Ten blocks of ten tokens each, of eighty: eight such sequences.
    assert reporter.report(600.0, EngineLoad(total_blocks=80)).seats == pytest.approx(8)
    assert reporter.report(600.0, EngineLoad(total_slots=5)).seats == pytest.approx(5)


def test_slower_in_company_is_learned() -> None:
    """Steps of 1 + 0.1 for each other sequence, at batches that change."""
    policy = admission(seats=64, waiting=64)
    now = 0.0
    for batch in [1, 4, 8, 2, 16, 1, 6, 12] * 6:
        tickets = policy.begin([Work(prompt_tokens=1, max_tokens=99)] * batch, now)
        for ticket in tickets:
            policy.first_token(ticket, now)
            ticket.emitted = 11
        now += 10 * (1 + 0.1 * batch)
        for ticket in tickets:
            policy.end(ticket, now)
    assert policy.rates.slowdown == pytest.approx(0.1, rel=0.05)


def test_nothing_is_said_of_company_that_never_changed() -> None:
    policy = admission()
    for turn in range(50):
        serve_one(policy, turn * 10.0, prompt=1, answer=10, token_s=0.1 + turn * 0.001)
    assert policy.rates.slowdown == 0.0


def points(*values: float) -> list[Any]:
    return [SimpleNamespace(timestamp=i, value=value) for i, value in enumerate(values)]


def test_rates_are_averaged_and_the_rest_is_as_it_is_now() -> None:
    names = [field.name for field in fields(ReplicaLoad)]
    metrics = {name: {"a": points(1, 2, 6), "b": points(4)} for name in names}
    metrics["seats"]["c"] = points(1)  # has not said everything
    metrics["other"] = {"a": points(9)}
    first, second = replica_loads(metrics)
    averaged = {"arrivals", "departures", "residence", "prefill"}
    assert asdict(first) == {name: 3 if name in averaged else 6 for name in names}
    assert asdict(second) == dict.fromkeys(names, 4)
    assert replica_loads({}) == []


def context(target: int = 3, **metrics: Any) -> Any:
    return SimpleNamespace(
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
        target_num_replicas=target,
        current_time=100.0,
        raw_metrics=metrics,
    )


def test_without_reports_nothing_changes() -> None:
    assert WorkPolicy()(context()) == (3, {})


# What Serve's controller does with the bytes it is sent, where our packages are not.
CONTROLLER = """
import base64, sys
sys.modules["deploy"] = sys.modules["shards"] = sys.modules["router"] = None
from types import SimpleNamespace
from ray import cloudpickle
policy = cloudpickle.loads(base64.b64decode(sys.stdin.read()))(ttft_s=1.0)
names = "seats sequences arrivals departures residence prefill backlog_s oldest_wait_s"
names = [*names.split(), "memory", "slowdown", "startup_s"]
values = dict.fromkeys(names, 0.0) | {"seats": 4.0, "sequences": 40.0}
metrics = {n: {1: [SimpleNamespace(timestamp=0.0, value=v)]} for n, v in values.items()}
print(policy(SimpleNamespace(
    capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=5,
    target_num_replicas=1, current_time=1.0, raw_metrics=metrics,
)))
"""


def test_the_controller_needs_none_of_our_modules() -> None:
    config = autoscaling_config(1, 5, ScalingTargets())
    sent = base64.b64encode(config.policy.get_serialized_policy_def()).decode()
    done = subprocess.run(
        [sys.executable, "-c", CONTROLLER], input=sent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "(5, {})", done.stderr


def deployment(**options: Any) -> Any:
    resolved = resolve(parse_args({"model": "nano-jamba", **options}))
    return application(resolved)._bound_deployment._deployment_config


def test_options_reach_serve() -> None:
    config = deployment(
        max_replicas=4, ttft_target=0.5, scale_down_delay=33, drain_timeout=700, max_num_seqs=8
    )
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.initial_replicas is None
    assert scaling.policy.policy_kwargs["ttft_s"] == 0.5
    assert scaling.policy.policy_kwargs["scale_down_delay_s"] == 33
    assert config.graceful_shutdown_timeout_s == 700
    assert config.max_queued_requests == -1


def test_a_fixed_number_has_no_policy() -> None:
    config = deployment(min_replicas=2)
    assert config.num_replicas == 2
    assert config.autoscaling_config is None


def test_none_when_idle_starts_with_one_and_bounds_who_is_held() -> None:
    config = deployment(min_replicas=0, max_num_seqs=8)
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 1)
    assert scaling.downscale_to_zero_delay_s == 60
    assert config.max_queued_requests == 64 * 8
    assert config.backpressure_config.retry_after_s == 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_replicas": -1}, ["min_replicas=-1", "0 or more"]),
        ({"max_replicas": 0}, ["max_replicas=0", "1 or more"]),
        ({"min_replicas": 3, "max_replicas": 2}, ["max_replicas=2", "3"]),
        ({"ttft_target": 0}, ["ttft_target=0", "more than 0"]),
        ({"scale_down_delay": -1}, ["scale_down_delay=-1", "0 or more"]),
        ({"drain_timeout": "long"}, ["drain_timeout=long", "numbers"]),
    ],
)
def test_refused_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_args({"model": "nano-jamba", **options})
    assert all(word in str(refused.value) for word in words), refused.value
