"""What the exchanges of one MoE layer have cost, as counters that only grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class LayerTotals:
    """Counted by one dispatcher since its process started; `seconds` from `submit` to the last row.

    Exchanges under way at the same time count their seconds each. Bytes are those of rows.
    """

    exchanges: int = 0
    calls: int = 0
    resends: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    """How many tokens each logical expert got."""

    def count_tokens(self, counts: Sequence[int]) -> None:
        """`counts[e]` more tokens for expert e; it may know of fewer experts than were seen."""
        if len(self.tokens) < len(counts):
            self.tokens += [0] * (len(counts) - len(self.tokens))
        for expert, count in enumerate(counts):
            self.tokens[expert] += count

    def add(self, other: LayerTotals) -> None:
        """Count what another dispatcher has counted too."""
        self.exchanges += other.exchanges
        self.calls += other.calls
        self.resends += other.resends
        self.sent_bytes += other.sent_bytes
        self.received_bytes += other.received_bytes
        self.seconds += other.seconds
        self.count_tokens(other.tokens)


def sum_by_layer(totals: Iterable[Mapping[int, LayerTotals]]) -> dict[int, LayerTotals]:
    """The totals of all dispatchers of an instance: layer → totals, in the order of the layers."""
    found: dict[int, LayerTotals] = {}
    for by_layer in totals:
        for layer, seen in by_layer.items():
            found.setdefault(layer, LayerTotals()).add(seen)
    return dict(sorted(found.items()))
