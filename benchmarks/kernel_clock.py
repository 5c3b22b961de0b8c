"""How much of a run passes inside each C function."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from models.kernels import functions, native, variants

_PRODUCT = "conclave_linear"


class KernelClock:
    """Seconds inside the C functions and how often they were called, by name.

    Products are told apart by their outputs and width.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def clear(self) -> None:
        """Begin again."""
        self.seconds.clear()
        self.calls.clear()


class _TimedFunction:
    """A C function that adds its time to a clock."""

    def __init__(self, function: Callable[..., Any], name: str, clock: KernelClock) -> None:
        self.__dict__.update(function=function, name=name, clock=clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["function"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["function"], name, value)

    def __call__(self, *arguments: Any) -> Any:
        function, name, clock = (self.__dict__[key] for key in ("function", "name", "clock"))
        begin = time.perf_counter()
        result = function(*arguments)
        seconds = time.perf_counter() - begin
        if name == _PRODUCT:
            name = f"{name} {arguments[8]}x{arguments[2]}"
        clock.seconds[name] += seconds
        clock.calls[name] += 1
        return result


class _TimedLibrary:
    def __init__(self, library: Any, clock: KernelClock) -> None:
        self._library = library
        self._clock = clock

    def __getattr__(self, name: str) -> _TimedFunction:
        return _TimedFunction(getattr(self._library, name), name, self._clock)

    def __getitem__(self, name: str) -> _TimedFunction:
        return _TimedFunction(self._library[name], name, self._clock)


@contextmanager
def apart() -> Iterator[None]:
    """Layers call their kernels one by one: in one call for a mixer or a step none is seen."""
    with ExitStack() as stack:
        stack.enter_context(patch("shards.model_runner.FEW_ROWS", 0))
        for module in ("models.layers.attention_mix", "models.jamba_mixer"):
            stack.enter_context(patch(f"{module}.native_kernels_together", lambda *_: None))
        for whole in ("shards.expert_bank.moe_kernels", "shards.expert_bank.routed_kernels",
                      "models.jamba_layer.routed_kernels"):  # fmt: skip
            stack.enter_context(patch(whole, lambda *_: None))
        yield


@contextmanager
def timed_kernels(choice: str = "auto") -> Iterator[KernelClock]:
    """Compute with `choice` meanwhile; every C function that is looked up adds to the clock."""
    clock = KernelClock()
    load = variants.load
    timed: Callable[..., Any] = lambda variant: _TimedLibrary(load(variant), clock)  # noqa: E731
    functions.function.cache_clear()
    with patch.object(native, "load", timed), patch.object(functions, "load", timed):
        native.use_kernels(choice)
        yield clock
    functions.function.cache_clear()
    native.use_kernels("auto")
