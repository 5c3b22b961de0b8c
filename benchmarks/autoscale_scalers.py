"""Who decides how many replicas there are: Serve's own code around a policy, or a plan."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ray.serve import autoscaling_policy as serve_policy
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.autoscale_replica import Replica
from deploy.autoscaling import REPORT_S, autoscaling_config
from deploy.scaling_policy import ScalingTargets

_DEPLOYMENT = DeploymentID(name="Ingress", app_name="simulated")


class Scaler(Protocol):
    """Asked every REPORT_S seconds."""

    def decide(self, now: float, ready: Sequence[Replica], target: int, held: int) -> int:
        """The number of replicas to aim at; `held` requests wait because there is none."""


class _Clock:
    """Serve's wrapper asks the time itself; it is told the simulated one."""

    now = 0.0

    def time(self) -> float:
        return self.now


class ServeScaler:
    """A policy as Serve's controller would call it: its wrapper, its delays, its bounds."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self.config = config
        self._custom = not config.policy.is_default_policy_function()
        policy = _resolve_policy_callable(config.policy)
        self._policy = serve_policy._apply_autoscaling_config(policy)
        self._state: dict[str, Any] = {}
        self._clock = _Clock()
        self._ongoing: deque[tuple[float, float]] = deque()
        self._series: dict[str, dict[Replica, list[TimeStampedValue]]] = {}

    def decide(self, now: float, ready: Sequence[Replica], target: int, held: int) -> int:
        """The decision by what was reported until now, and then the reports of now."""
        self._clock.now = now
        # Only while deciding: the module is shared by all scalers.
        real, serve_policy.time = serve_policy.time, self._clock
        try:
            number, self._state = self._policy(self._context(now, ready, target))
        finally:
            serve_policy.time = real
        self._record(now, ready, held)
        config = self.config
        return int(max(config.min_replicas, min(config.max_replicas, math.ceil(number))))

    def _record(self, now: float, ready: Sequence[Replica], held: int) -> None:
        since = now - self.config.look_back_period_s
        self._ongoing.append((now, held + sum(replica.live for replica in ready)))
        while self._ongoing[0][0] <= since:
            self._ongoing.popleft()
        if not self._custom:
            return
        for replica in ready:
            for name, value in asdict(replica.report(now)).items():
                points = self._series.setdefault(name, {}).setdefault(replica, [])
                points.append(TimeStampedValue(now, value))
                while points[0].timestamp <= since:
                    del points[0]

    def _context(self, now: float, ready: Sequence[Replica], target: int) -> AutoscalingContext:
        ongoing = [number for _, number in self._ongoing]
        keys = set(ready)
        return AutoscalingContext(
            deployment_id=_DEPLOYMENT,
            deployment_name=_DEPLOYMENT.name,
            app_name=_DEPLOYMENT.app_name,
            current_num_replicas=len(ready),
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=sum(ongoing) / len(ongoing) if ongoing else 0.0,
            total_queued_requests=0.0,
            aggregated_metrics=None,
            raw_metrics={
                name: {key: points for key, points in each.items() if key in keys}
                for name, each in self._series.items()
            },
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=dict(self._state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
        )


def ours(targets: ScalingTargets, most: int) -> ServeScaler:
    """The shipped configuration."""
    return ServeScaler(autoscaling_config(1, most, targets))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What can be set of Serve's default policy."""

    target_ongoing_requests: float
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_s: float


def serve_default(tuning: Tuning, most: int) -> ServeScaler:
    """Serve's `target_ongoing_requests`."""
    return ServeScaler(
        AutoscalingConfig(
            min_replicas=1,
            max_replicas=most,
            target_ongoing_requests=tuning.target_ongoing_requests,
            upscale_delay_s=tuning.upscale_delay_s,
            downscale_delay_s=tuning.downscale_delay_s,
            look_back_period_s=tuning.look_back_s,
            metrics_interval_s=REPORT_S,
        )
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """So many replicas in each window, whatever happens."""

    window_s: float
    numbers: tuple[int, ...]

    def decide(self, now: float, ready: Sequence[Replica], target: int, held: int) -> int:
        """The number of the window that `now` is in."""
        return self.numbers[min(int(now / self.window_s), len(self.numbers) - 1)]
