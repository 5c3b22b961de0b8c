"""Each kernel taken out by itself: PyTorch computes it, and the numbers contract holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.kernels.choice import KERNELS, VARIABLE, backends, resolve_kernels
from models.kernels.native import native_kernels, use_kernels
from models.layers.rowwise import row_tile
from tests.models.built import needs_kernels
from tests.models.driver import Chunk, Served, tokens_of
from tests.models.oracle import assert_all_ways, assert_close, reference, tiny
from tests.tiny import FAMILIES

CPU = torch.device("cpu")
TOKENS = tokens_of(3, 37)


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    yield
    use_kernels("auto")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


@cache
def expected(folder: Path) -> Tensor:
    return reference(folder, TOKENS)


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_without_one_kernel(model: Path, kernel: str) -> None:
    """The reference's logits, and the same bits in chunks, steps and company."""
    use_kernels(f"native,-{kernel}")
    native = {name for name in KERNELS if native_kernels(name, torch.float32, CPU)}
    assert native == set(KERNELS) - {kernel}
    assert (row_tile(torch.float32) > 1) == (kernel == "linear")
    assert_all_ways(model, expected(model), TOKENS)


@needs_kernels
@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("kernel", ["linear", "gate", "experts"])
def test_fewer_experts_than_a_product_has_columns(
    kernel: str, experts: int, tmp_path: Path
) -> None:
    folder = tiny("phimoe", tmp_path, num_local_experts=experts)
    use_kernels(f"native,-{kernel}")
    assert_all_ways(folder, reference(folder, TOKENS), TOKENS)


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_with_only_one_kernel(model: Path, kernel: str) -> None:
    others = [f",-{other}" for other in KERNELS if other != kernel]
    use_kernels("native" + "".join(others))
    assert native_kernels(kernel, torch.float32, CPU)
    assert_close(Served.open(model).step([Chunk(0, 0, TOKENS)])[0], expected(model))


def test_a_model_without_kernels(model: Path) -> None:
    use_kernels("torch")
    assert_all_ways(model, expected(model), TOKENS)


@needs_kernels
def test_one_spelling_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the group's workers are told does not depend on how it was asked for."""
    monkeypatch.delenv(VARIABLE, raising=False)
    best = resolve_kernels("native")
    assert resolve_kernels("auto,-scan,-linear,-scan") == f"{best},-linear,-scan"
    assert resolve_kernels(f"{best},-linear,-scan") == f"{best},-linear,-scan"
    assert resolve_kernels("torch,-scan") == "torch"
    monkeypatch.setenv(VARIABLE, "auto,-rope")
    assert resolve_kernels() == f"{best},-rope"
    computes = backends(resolve_kernels())
    assert computes.pop("rope") == "torch"
    assert set(computes.values()) == {best}


@pytest.mark.parametrize(
    "choice", ["fast", "auto,attention", "auto,-atention", "auto,", "-attention", "auto -scan", ","]
)
def test_a_misspelt_choice_is_refused(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, choice)
    for name, given in (("kernels", choice), (VARIABLE, "auto")):
        with pytest.raises(ValueError, match=f"{name}={choice}: allowed values are auto, ") as said:
            resolve_kernels(given)
        assert all(f",-{kernel}" in str(said.value) for kernel in KERNELS)


def test_a_layer_asks_for_a_kernel_that_there_is() -> None:
    with pytest.raises(KeyError):
        native_kernels("atention", torch.float32, CPU)
