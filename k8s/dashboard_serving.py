"""Rows about what clients ask and get: traffic, latency, engine."""

from __future__ import annotations

from k8s.dashboard_panels import Panel, Query, Row
from k8s.dashboard_queries import each, mean, ours, quantile, quantiles, rate, ratio, total

_ASKED = 'route!~"/health|/ready|/metrics"'

TRAFFIC = Row(
    "Traffic",
    Panel(
        title="Requests by status",
        about="Requests that ended, without health checks and scrapes; 499: the client left.",
        unit="reqps",
        stacked=True,
        queries=(each(rate("requests_total", _ASKED), "status"),),
    ),
    Panel(
        title="Requests by route",
        about="The same by what was asked; calls over handles are handle.*.",
        unit="reqps",
        stacked=True,
        queries=(each(rate("requests_total", _ASKED), "route"),),
    ),
    Panel(
        title="Requests under way",
        about="Arrived and not over, in each replica.",
        unit="short",
        queries=(each(ours("requests_in_progress"), "replica_id"),),
    ),
    Panel(
        title="Tokens per second",
        about="Of prompts given to the engine, and generated.",
        unit="short",
        queries=(
            Query(total(rate("prompt_tokens_total")), "prompt"),
            Query(total(rate("generation_tokens_total")), "generated"),
        ),
    ),
    Panel(
        title="Errors",
        about="Requests that ended with an error, by its code.",
        unit="reqps",
        stacked=True,
        queries=(each(rate("errors_total"), "code"),),
    ),
    Panel(
        title="Refusals",
        about="Requests that were told to come back later: the instance had no room.",
        unit="reqps",
        stacked=True,
        queries=(each(rate("admission_refusals_total"), "code"),),
    ),
)

LATENCY = Row(
    "Latency",
    Panel(
        title="Time to first token",
        about="From the arrival of a request: validation, tokenizing, queue and prefill.",
        unit="s",
        queries=quantiles("time_to_first_token_seconds"),
    ),
    Panel(
        title="Between tokens",
        about="One token of a sequence to its next.",
        unit="s",
        queries=quantiles("inter_token_latency_seconds"),
    ),
    Panel(
        title="In the queue",
        about="From the arrival of a sequence to its first step.",
        unit="s",
        queries=quantiles("queue_time_seconds"),
    ),
    Panel(
        title="Whole requests, p95",
        about="Arrival to end, by route.",
        unit="s",
        width=12,
        queries=(Query(quantile("0.95", "request_duration_seconds", "route"), "{{route}}"),),
    ),
    Panel(
        title="Means",
        about="Where a quantile lies inside one wide bucket the mean says more.",
        unit="s",
        width=12,
        queries=(
            Query(mean("time_to_first_token_seconds"), "first token"),
            Query(mean("inter_token_latency_seconds"), "between tokens"),
            Query(mean("queue_time_seconds"), "queue"),
        ),
    ),
)


def _share(part: str, whole: str, words: str = "") -> Query:
    return Query(ratio(part, whole, "replica_id"), f"{words} {{{{replica_id}}}}".lstrip())


ENGINE = Row(
    "Engine",
    Panel(
        title="Sequences",
        about="Those that take part in steps, and those that wait for one.",
        unit="short",
        queries=(
            each(ours("sequences_running"), "replica_id", "running"),
            each(ours("sequences_waiting"), "replica_id", "waiting"),
        ),
    ),
    Panel(
        title="KV cache",
        about="Share of the blocks that sequences hold; kept prefixes give way and do not count.",
        unit="percentunit",
        queries=(_share(ours("kv_cache_blocks_used"), ours("kv_cache_blocks")),),
    ),
    Panel(
        title="Recurrent state",
        about="Share of the slots that sequences hold, and of the snapshots that are kept.",
        unit="percentunit",
        queries=(
            _share(ours("state_slots_used"), ours("state_slots"), "slots"),
            _share(ours("state_snapshots_used"), ours("state_snapshots"), "snapshots"),
        ),
    ),
    Panel(
        title="Preemptions",
        about="Sequences that gave their memory to others and are computed again.",
        unit="cps",
        width=12,
        queries=(each(rate("preemptions_total"), "replica_id"),),
    ),
    Panel(
        title="Prefix hits",
        about="Share of the tokens of starting sequences that a cached prefix saved.",
        unit="percentunit",
        width=12,
        queries=(_share(rate("prefix_hit_tokens_total"), rate("prefix_tokens_total")),),
    ),
)
