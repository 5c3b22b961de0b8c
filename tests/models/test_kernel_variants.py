"""Building native kernels: when, where, by whom; and what happens where that is impossible."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.kernels import variants
from models.kernels.choice import VARIABLE, resolve_kernels
from models.kernels.native import native_kernels, use_kernels
from models.kernels.variants import VARIANTS, KernelsUnavailable, Variant, supported_variants
from models.layers.rowwise import linear, row_tile

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None or not supported_variants(),
    reason="nothing can be built here",
)


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library of two functions instead of ours, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "ready.c").write_text(
        '#include "answer.h"\n'
        'int __attribute__((visibility("default"))) conclave_ready(int tiles) { return ANSWER; }\n'
    )
    (folder / "answer.h").write_text("#define ANSWER 1\n")
    monkeypatch.setattr(variants, "_SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered of the real machine, nor of this test afterwards."""
    chosen = os.environ.get(VARIABLE)
    monkeypatch.delenv(VARIABLE, raising=False)
    variants.load.cache_clear()
    variants._cpu_flags.cache_clear()
    yield
    variants.load.cache_clear()
    variants._cpu_flags.cache_clear()
    monkeypatch.undo()
    use_kernels(chosen or "auto")


def anything() -> Variant:
    return Variant(name="any", needs=frozenset(), flags=())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@needs_compiler
def test_it_is_compiled_once(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = variants.build(anything())
    assert files_of(tmp_path / "cache") == [path]
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert variants.load(anything()).conclave_ready(0) == 1
    monkeypatch.setattr(variants, "_compile", pytest.fail)
    assert variants.build(anything()) == path


@needs_compiler
def test_whatever_decides_the_bytes_makes_another_library(sources: Path) -> None:
    first = variants.build(anything())
    (sources / "answer.h").write_text("#define ANSWER 2\n")
    second = variants.build(anything())
    third = variants.build(Variant(name="any", needs=frozenset(), flags=("-g",)))
    assert len({first, second, third}) == 3
    assert variants.load(anything()).conclave_ready(0) == 2


@needs_compiler
def test_workers_build_at_the_same_time(sources: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: variants.build(anything()), range(4)))
    assert files_of(tmp_path / "cache") == list(paths)


@needs_compiler
def test_what_others_could_have_written_is_not_loaded(sources: Path) -> None:
    path = variants.build(anything())
    path.write_bytes(b"not ours")
    path.chmod(0o722)
    assert variants.build(anything()) == path
    assert path.read_bytes() != b"not ours"


def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "conclave" / "kernels"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    private = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(private))
    assert variants.cache_folder() == private / ".cache" / "conclave" / "kernels"
    link = tmp_path / "link" / "conclave"
    link.mkdir(parents=True)
    (link / "kernels").symlink_to(private)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    assert variants.cache_folder() == private / ".cache" / "conclave" / "kernels"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(KernelsUnavailable, match="no private folder"):
        variants.cache_folder()


def supported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: frozenset[str]) -> None:
    """Pretend that the processor has these flags."""
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\nflags\t\t: {' '.join(sorted(flags))}\n")
    monkeypatch.setattr(variants, "_CPU_FILE", file)


@pytest.mark.parametrize("missing", ["compiler", "broken compiler", "processor"])
def test_without_native_kernels_torch_computes_and_says_why(
    missing: str,
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = frozenset() if missing == "processor" else VARIANTS[-1].needs
    supported(monkeypatch, tmp_path, flags)
    reason = {
        "compiler": "there is no C compiler",
        "broken compiler": "cannot compile them",
        "processor": "x86-64 processors with AVX2",
    }[missing]
    if missing == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    if missing == "broken compiler":
        monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.WARNING):
        assert resolve_kernels() == "torch"
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    with pytest.raises(ValueError, match=reason):
        resolve_kernels("native")
    use_kernels("auto")
    assert native_kernels("linear", torch.float32, torch.device("cpu")) is None
    x = torch.randn(row_tile(torch.float32), 5)
    torch.testing.assert_close(linear(x, torch.eye(5)), x)


@needs_compiler
def test_the_best_variant_that_works_is_chosen(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in VARIANTS:
        variants._cpu_flags.cache_clear()
        supported(monkeypatch, tmp_path, variant.needs)
        assert resolve_kernels() == resolve_kernels("native") == variant.name
    variants.load.cache_clear()
    with pytest.raises(ValueError, match=r"kernels=amx: .*this processor has no amx_bf16"):
        resolve_kernels("amx")


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert resolve_kernels() == "torch"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="CONCLAVE_KERNELS=fast: allowed values are auto, native"):
        resolve_kernels()


@needs_compiler
def test_other_devices_and_dtypes_stay_with_torch() -> None:
    use_kernels("native")
    assert native_kernels("linear", torch.float32, torch.device("cpu")) is not None
    assert native_kernels("linear", torch.float32, torch.device("meta")) is None
    assert native_kernels("linear", torch.float64, torch.device("cpu")) is None


@needs_compiler
def test_a_layer_computes_with_what_was_chosen() -> None:
    x, w = (torch.randn(n, 300, generator=torch.Generator().manual_seed(n)) for n in (8, 64))

    def products(choice: str) -> Tensor:
        use_kernels(choice)
        return linear(x, w)

    native, plain = products("native"), products("torch")
    torch.testing.assert_close(native, plain)
    assert not torch.equal(native, plain)
    assert row_tile(torch.float32) == 8
    use_kernels("native")
    assert row_tile(torch.float32) == 1
