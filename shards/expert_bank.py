"""The weights of some logical experts, for every MoE layer, and what they make of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.gate import Gate
from models.interface import ExpertWeights, ModelConfig, Routing
from models.kernels.program import Program
from models.kernels.routed import RoutedExperts
from models.kernels.whole_moe import WholeMoe
from models.layers.activation import ACTIVATIONS
from models.layers.moe import expert_rows, moe_kernels, routed_kernels


class ExpertBank:
    """Stateless experts: the same rows give the same bits in every bank that holds the expert."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[tuple[int, int], ExpertWeights]
    ) -> None:
        """`weights` is keyed (layer_idx, expert)."""
        self._config = config
        self._activation = ACTIVATIONS[config.activation]
        self._weights = dict(weights)
        self._routed: dict[int, RoutedExperts] = {}
        self._whole: dict[int, WholeMoe] = {}
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

    def check(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> None:
        """Raises ValueError for experts that are not held here or rows of another width."""
        for expert, _ in pairs:
            if (layer_idx, expert) not in self._weights:
                raise ValueError(f"expert {expert} of layer {layer_idx}: held {self.experts}")
        if rows.shape[1] != self.hidden_size:
            raise ValueError(f"rows of width {rows.shape[1]}: allowed {self.hidden_size}")

    def forward(self, layer_idx: int, pairs: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """Unweighted outputs [n, D] of `rows` [n, D], in their order.

        `pairs` lists (expert, count): the first `count` rows belong to the first expert, and so
        on; the counts add up to n. Raises KeyError for an expert that is not held here.
        """
        groups = [(self._weights[layer_idx, expert], count) for expert, count in pairs]
        assert sum(count for _, count in pairs) == len(rows), (pairs, rows.shape)
        return expert_rows(rows, groups, self._activation)

    def routed(self, layer_idx: int, x: Tensor, routing: Routing) -> Tensor | None:
        """Σ weight · expert(x) over the slots of each token of x [T, D], in their order: [T, D].

        None where no kernel does it in one call. The bank holds every expert.
        """
        kernels = routed_kernels(x, self._activation)
        if kernels is None:
            return None
        experts = self._experts_of(layer_idx)
        return experts(kernels.name, x, routing.expert_ids, routing.weights)

    def gated(
        self, layer_idx: int, gate: Gate, residual: Tensor, h: Tensor, program: Program | None
    ) -> Tensor | None:
        """residual + what `routed` makes of the gate's choice for h: three [T, D].

        None where no kernel does it in one call.
        """
        kernels = moe_kernels(h, gate, self._activation)
        if kernels is None:
            return None
        whole = self._whole.get(layer_idx)
        if whole is None or whole.gate is not gate:
            whole = self._whole[layer_idx] = WholeMoe(gate, self._experts_of(layer_idx))
        return whole(kernels.name, residual, h, program)

    def _experts_of(self, layer_idx: int) -> RoutedExperts:
        experts = self._routed.get(layer_idx)
        if experts is None:
            weights = [self._weights[layer_idx, e] for e in range(self._config.num_experts)]
            experts = self._routed[layer_idx] = RoutedExperts(weights)
        return experts
