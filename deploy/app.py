"""`serve run deploy.app:build model=nano-jamba stages=2`: the Serve application."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import serve

from deploy.api_keys import with_environment_key
from deploy.ingress import Ingress
from deploy.rehearsal import rehearsed
from deploy.reservation import bundle_cpus
from deploy.resolve import ResolvedArgs, resolve

if TYPE_CHECKING:
    from ray.serve import Application

# Serve's own limit sits far above our admission, which answers with OpenAI's error body.
_SERVE_REQUESTS_PER_SEQ = 64
_DRAIN_S = 120.0


def build(args: dict[str, Any]) -> Application:
    """One application for one model; `args` are the command line's options with underscores.

    Everything is checked before a weight is read. Raises ConfigError.
    """
    checked, changes = rehearsed(with_environment_key(args))
    resolved = resolve(checked)
    return application(replace(resolved, warnings=(*changes, *resolved.warnings)))


def application(resolved: ResolvedArgs) -> Application:
    """The Serve application of a model whose options are resolved."""
    scaling: dict[str, Any] = {"num_replicas": resolved.min_replicas}
    if resolved.max_replicas > resolved.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": resolved.min_replicas,
                "max_replicas": resolved.max_replicas,
                "target_ongoing_requests": resolved.spec.limits.max_num_seqs,
            }
        }
    deployment = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": resolved.cpus_per_actor},
        placement_group_bundles=[{"CPU": cpus} for cpus in bundle_cpus(resolved)],
        # One bundle per node, or one per actor on as few nodes as have room.
        placement_group_strategy="PACK" if resolved.spec.num_nodes is None else "STRICT_SPREAD",
        max_ongoing_requests=_SERVE_REQUESTS_PER_SEQ * resolved.spec.limits.max_num_seqs,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        **scaling,
    )
    return deployment(Ingress).bind(resolved)
