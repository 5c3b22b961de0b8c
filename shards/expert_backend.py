"""How a model runner reaches the experts: submit rows, do something else, collect the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.interface import DecoderLayer, Routing
from models.kernels.program import Program
from router.permutation import combine, permute
from shards.expert_bank import ExpertBank


@dataclass(frozen=True, slots=True)
class ExchangeKey:
    """With the layer, the identity of one expert exchange of a stage."""

    epoch: int
    step_id: int
    micro_batch: int


class Handle(Protocol):
    """The answer to come of one exchange."""

    def result(self) -> Tensor:
        """Wait for the weighted sum over each token's experts, [T, D]. Call it once."""


class ExpertBackend(Protocol):
    """Runs the routed experts of a MoE layer, here or elsewhere, with the same bits."""

    def submit(self, key: ExchangeKey, layer_idx: int, hidden: Tensor, routing: Routing) -> Handle:
        """Start the experts on `hidden` [T, D]; `routing` has the same T tokens."""


@dataclass(frozen=True, slots=True)
class _Finished:
    outputs: Tensor

    def result(self) -> Tensor:
        return self.outputs


class LocalExpertBackend:
    """All experts in this process, computed during `submit`."""

    def __init__(self, bank: ExpertBank, num_experts: int) -> None:
        self._bank = bank
        self._num_experts = num_experts

    def finish(
        self, layer: DecoderLayer, residual: Tensor, hidden: Tensor, program: Program | None
    ) -> Tensor | None:
        """Gate, experts and combine of a MoE layer [T, D]; None where that is not one call.

        Bits as by `gate`, `submit` and `combine`.
        """
        assert layer.chooser is not None, f"layer {layer.layer_idx} has no gate"
        return self._bank.gated(layer.layer_idx, layer.chooser, residual, hidden, program)

    def submit(self, key: ExchangeKey, layer_idx: int, hidden: Tensor, routing: Routing) -> Handle:
        """Bits as on the distributed path: in one call, or by its own permutation and combine."""
        outputs = self._bank.routed(layer_idx, hidden, routing)
        if outputs is not None:
            return _Finished(outputs)
        permutation = permute(routing.expert_ids, self._num_experts)
        pairs = [(expert, count) for expert, count in enumerate(permutation.counts) if count]
        rows = self._bank.forward(layer_idx, pairs, hidden[permutation.tokens])
        return _Finished(combine(rows, permutation, routing.weights, hidden.dtype))
