"""`serve run deploy.app:build model=nano-jamba stages=2`: the Serve application."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import BackpressureConfig

from deploy.api_keys import with_environment_key
from deploy.autoscaling import autoscaling_config
from deploy.ingress import Ingress
from deploy.rehearsal import rehearsed
from deploy.reservation import bundle_cpus
from deploy.resolve import ResolvedArgs, resolve

if TYPE_CHECKING:
    from ray.serve import Application

# Serve's own limit sits far above our admission, which answers with OpenAI's error body.
_SERVE_REQUESTS_PER_SEQ = 64
_COLD_RETRY_S = 30.0
"""When to come again if too many already wait for the first replica."""


def build(args: dict[str, Any]) -> Application:
    """One application for one model; `args` are the command line's options with underscores.

    Everything is checked before a weight is read. Raises ConfigError.
    """
    checked, changes = rehearsed(with_environment_key(args))
    resolved = resolve(checked)
    return application(replace(resolved, warnings=(*changes, *resolved.warnings)))


def application(resolved: ResolvedArgs) -> Application:
    """The Serve application of a model whose options are resolved."""
    bounds = resolved.min_replicas, resolved.max_replicas
    most = _SERVE_REQUESTS_PER_SEQ * resolved.spec.limits.max_num_seqs
    scaling: dict[str, Any] = {"num_replicas": bounds[0]}
    if bounds[1] > bounds[0]:
        scaling = {"autoscaling_config": autoscaling_config(*bounds, resolved.scaling)}
    scaling["max_queued_requests"] = -1
    if not bounds[0]:
        # Without a replica Serve's proxy holds requests: no more than one replica would take.
        scaling["max_queued_requests"] = most
        scaling["backpressure_config"] = BackpressureConfig(retry_after_s=_COLD_RETRY_S)
    deployment = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": resolved.cpus_per_actor},
        placement_group_bundles=[{"CPU": cpus} for cpus in bundle_cpus(resolved)],
        # One bundle per node, or one per actor on as few nodes as have room.
        placement_group_strategy="PACK" if resolved.spec.num_nodes is None else "STRICT_SPREAD",
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=resolved.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        **scaling,
    )
    return deployment(Ingress).bind(resolved)
