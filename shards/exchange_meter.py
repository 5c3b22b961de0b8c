"""What a stage's exchanges with the experts take, measured while a step is traced."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from models.interface import Routing
from router.step_trace import LayerTrace, StageTrace
from shards.expert_backend import ExchangeKey, ExpertBackend, Handle


@dataclass(slots=True)
class _Layer:
    exchanges: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(slots=True)
class StepMeter:
    """One step of one stage, which began at `began`; times are the caller's."""

    stage: int
    began: float
    _under_way: int = 0
    _busy_since: float = 0.0
    _busy_s: float = 0.0
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def open(self, layer: int, num_bytes: int, now: float) -> None:
        """An exchange begins."""
        if not self._under_way:
            self._busy_since = now
        self._under_way += 1
        totals = self._layers.setdefault(layer, _Layer())
        totals.exchanges += 1
        totals.num_bytes += num_bytes

    def close(self, layer: int, opened: float, now: float) -> None:
        """The exchange that began at `opened` has its answer."""
        self._layers[layer].seconds += now - opened
        self._under_way -= 1
        if not self._under_way:
            self._busy_s += now - self._busy_since

    def trace(self, now: float) -> StageTrace:
        """The step is done."""
        return StageTrace(
            stage=self.stage,
            seconds=now - self.began,
            exchange_seconds=self._busy_s,
            layers=tuple(
                LayerTrace(
                    layer=layer,
                    exchanges=each.exchanges,
                    seconds=each.seconds,
                    num_bytes=each.num_bytes,
                )
                for layer, each in sorted(self._layers.items())
            ),
        )


@dataclass(slots=True)
class _MeteredHandle:
    handle: Handle
    meter: StepMeter
    layer: int
    opened: float

    def result(self) -> Tensor:
        """Wait for the answer, [T, D]."""
        rows = self.handle.result()
        self.meter.close(self.layer, self.opened, time.perf_counter())
        return rows


class MeteredBackend:
    """Another backend; while there is a `meter`, it hears of every exchange."""

    def __init__(self, backend: ExpertBackend) -> None:
        self._backend = backend
        self.meter: StepMeter | None = None

    def submit(self, key: ExchangeKey, layer_idx: int, hidden: Tensor, routing: Routing) -> Handle:
        """Start the experts on `hidden` [T, D]."""
        if self.meter is None:
            return self._backend.submit(key, layer_idx, hidden, routing)
        now = time.perf_counter()
        row_bytes = hidden.shape[1] * hidden.element_size()
        self.meter.open(layer_idx, 2 * routing.expert_ids.numel() * row_bytes, now)
        handle = self._backend.submit(key, layer_idx, hidden, routing)
        return _MeteredHandle(handle, self.meter, layer_idx, now)
