"""What `/v1/experts` says of the ways to the experts and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from deploy.openai_errors import Json
from router.layer_totals import LayerTotals


def dispatch_costs(totals: Mapping[int, LayerTotals]) -> list[Json]:
    """One entry for each MoE layer that was used: its counters and means, times in microseconds."""
    return [
        {
            "layer": layer,
            **asdict(seen),
            "mean_microseconds": round(1e6 * seen.seconds / max(1, seen.exchanges), 1),
            "mean_bytes": (seen.sent_bytes + seen.received_bytes) // max(1, seen.exchanges),
        }
        for layer, seen in totals.items()
    ]
