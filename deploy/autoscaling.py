"""Ray Serve's autoscaling with our policy: what replicas report in, a number of replicas out.

Serve asks every 0.1 s, in its controller, and applies the bounds and its own delays around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ray import cloudpickle
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deploy import scaling_policy
from deploy.scaling_policy import ReplicaLoad, ScalingPolicy, ScalingTargets

LOOK_BACK_S = 10.0
REPORT_S = 2.0
"""How often a replica reports, a fifth of the look-back; without this Serve's is 10 s."""
_AVERAGED = frozenset({"arrivals", "departures", "residence", "prefill"})
"""Rates between two reports; of everything else the newest counts."""


class WorkPolicy:
    """A policy for Serve; `targets` are the fields of ScalingTargets."""

    def __init__(self, **targets: float) -> None:
        self._policy = ScalingPolicy(ScalingTargets(**targets))

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted; Serve keeps no state for us."""
        bounds = (
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        loads = replica_loads(context.raw_metrics or {})
        target = context.target_num_replicas
        return self._policy.decide(context.current_time, loads, target, bounds), {}


def replica_loads(metrics: Mapping[str, Mapping[Any, Sequence[Any]]]) -> list[ReplicaLoad]:
    """By Serve's series of each metric and replica; replicas that miss one are left out."""
    names = [field.name for field in fields(ReplicaLoad)]
    series = [metrics.get(name, {}) for name in names]
    whole = [key for key in series[0] if all(each.get(key) for each in series)]
    return [
        ReplicaLoad(**{name: _value(name, s[key]) for name, s in zip(names, series, strict=True)})
        for key in whole
    ]


def _value(name: str, points: Sequence[Any]) -> float:
    if name in _AVERAGED:
        return sum(float(point.value) for point in points) / len(points)
    return float(points[-1].value)


def autoscaling_config(
    min_replicas: int, max_replicas: int, targets: ScalingTargets
) -> AutoscalingConfig:
    """Serve's configuration: our policy decides when, so Serve waits only before it goes to 0."""
    # The controller need not be able to import us: it is sent both modules.
    cloudpickle.register_pickle_by_value(scaling_policy)
    try:
        policy = AutoscalingPolicy(
            policy_function=f"{WorkPolicy.__module__}:{WorkPolicy.__name__}",
            policy_kwargs=asdict(targets),
        )
    finally:
        cloudpickle.unregister_pickle_by_value(scaling_policy)
    return AutoscalingConfig(
        min_replicas=min_replicas,
        # The first start shows whether the model can be served at all. Where there is always one
        # it does so by itself, and a new configuration leaves the present number as it is.
        initial_replicas=None if min_replicas else 1,
        max_replicas=max_replicas,
        look_back_period_s=LOOK_BACK_S,
        metrics_interval_s=REPORT_S,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=targets.scale_down_delay_s,
        policy=policy,
    )
