"""The weights of some logical experts, for every MoE layer, and what they make of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.interface import ExpertWeights, ModelConfig


class ExpertBank:
    """Stateless experts: the same rows give the same bits in every bank that holds the expert."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[tuple[int, int], ExpertWeights]
    ) -> None:
        """`weights` is keyed (layer_idx, expert)."""
        self._config = config
        self._weights = dict(weights)
        self.experts = tuple(sorted({expert for _, expert in self._weights}))

    @property
    def hidden_size(self) -> int:
        """Width D of a row."""
        return self._config.hidden_size

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take, scales of int8 ones included."""
        parts = (
            (w.gate, w.up, w.down, w.gate_scale, w.up_scale, w.down_scale)
            for w in self._weights.values()
        )
        return sum(part.nbytes for expert in parts for part in expert if part is not None)

    def forward(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """Unweighted outputs [n, D] of `rows` [n, D], in their order.

        `pairs` lists (expert, count): the first `count` rows belong to the first expert, and so
        on; the counts add up to n. Raises KeyError for an expert that is not held here.
        """
        groups = [(self._weights[layer_idx, expert], count) for expert, count in pairs]
        assert sum(count for _, count in pairs) == len(rows), (pairs, rows.shape)
        return self._config.expert_forward(rows, groups)
