"""Rows about what serves them: experts, dispatch, faults, cost."""

from __future__ import annotations

from k8s.dashboard_panels import Panel, Query, Row
from k8s.dashboard_queries import NODES, each, lately, mean, ours, rate, ratio, rays, total

_BY_EXPERT = total(rate("expert_tokens_total"), "layer", "expert")
_AGENTS = f'up{{{NODES}, endpoint="metrics"}}'
_CORES_BUSY = f"sum({rays('node_cpu_utilization')} * {rays('node_cpu_count')}) / 100"
_GPUS = rays("resources", 'Name="GPU"', 'State="USED"')

EXPERTS = Row(
    "Experts",
    Panel(
        title="Tokens by expert",
        about="Per second, over all layers; an expert is the model's, whoever holds its copies.",
        unit="short",
        stacked=True,
        queries=(each(rate("expert_tokens_total"), "expert", "expert"),),
    ),
    Panel(
        title="Imbalance by layer",
        about="Tokens of a layer's busiest expert over the mean of its experts; 1 is even.",
        unit="short",
        queries=(
            Query(
                f"max by (layer) ({_BY_EXPERT}) / avg by (layer) ({_BY_EXPERT})", "layer {{layer}}"
            ),
        ),
    ),
    Panel(
        title="Experts without a copy",
        about="Experts that no living actor holds: their tokens wait until one has loaded.",
        unit="short",
        queries=(each(ours("experts_without_copy"), "replica_id"),),
    ),
)

DISPATCH = Row(
    "Dispatch",
    Panel(
        title="Mean exchange by layer",
        about="Rows of a layer to their experts and back.",
        unit="s",
        queries=(Query(mean("dispatch_latency_seconds", "layer"), "layer {{layer}}"),),
    ),
    Panel(
        title="Bytes",
        about="Of rows, to the experts and back.",
        unit="Bps",
        queries=(each(rate("dispatch_bytes_total"), "direction"),),
    ),
    Panel(
        title="Calls",
        about="Calls to expert actors, and those that were sent again to another copy.",
        unit="cps",
        queries=(
            Query(total(rate("dispatch_calls_total")), "calls"),
            Query(total(rate("dispatch_resends_total")), "sent again"),
        ),
    ),
)

FAULTS = Row(
    "Faults",
    Panel(
        title="Replicas by state",
        about="A recovering one accepts requests, which wait until it has healed.",
        unit="short",
        stacked=True,
        queries=(each(ours("instance_state"), "state"),),
    ),
    Panel(
        title="Deaths of actors",
        about="In the last ten minutes, by role.",
        unit="short",
        queries=(each(lately("actor_deaths_total"), "role"),),
    ),
    Panel(
        title="Recoveries",
        about="Successors of dead actors that have loaded, in the last ten minutes.",
        unit="short",
        queries=(each(lately("actor_recoveries_total"), "role"),),
    ),
    Panel(
        title="Actors alive",
        about="Actors that have loaded and live, by role.",
        unit="short",
        queries=(each(ours("actors_alive"), "role"),),
    ),
    Panel(
        title="Memory of pods",
        about="Share in use, as Ray's agent sees it; at 1 the kernel ends a process.",
        unit="percentunit",
        queries=(Query(ratio(rays("node_mem_used"), rays("node_mem_total"), "pod"), "{{pod}}"),),
    ),
    Panel(
        title="Pods",
        about="Whose agent answered the last scrape, and whose did not.",
        unit="short",
        queries=(Query(f"sum({_AGENTS})", "answer"), Query(f"sum({_AGENTS} == bool 0)", "do not")),
    ),
    Panel(
        title="Spans of traces that were lost",
        about="In the last ten minutes: the collector does not answer, or too slowly.",
        unit="short",
        queries=(Query(total(lately("trace_spans_dropped_total")), "spans"),),
    ),
)

COST = Row(
    "Cost",
    Panel(
        title="Generated tokens per GPU-hour",
        about="Over the GPUs that Ray has given away; nothing where there are none.",
        unit="short",
        number=True,
        queries=(Query(f"3600 * {ratio(rate('generation_tokens_total'), _GPUS)}", "tokens"),),
    ),
    Panel(
        title="Generated tokens per actor-second",
        about="Over all actors that live, of any role.",
        unit="short",
        queries=(Query(ratio(rate("generation_tokens_total"), ours("actors_alive")), "tokens"),),
    ),
    Panel(
        title="Core-seconds per thousand tokens",
        about="Of all pods, for prompt and generated tokens together.",
        unit="s",
        queries=(
            Query(
                f"1000 * {_CORES_BUSY} / ({total(rate('prompt_tokens_total'))}"
                f" + {total(rate('generation_tokens_total'))})",
                "core-seconds",
            ),
        ),
    ),
)
