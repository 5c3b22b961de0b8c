"""The C files of this folder as a shared library: compiled once, kept in a private cache, loaded.

What is compiled for which processor is a variant; its library is found again by a hash of sources,
compiler and flags. Workers may build at the same time: the last one to finish wins, with the same
bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from models.kernels.prebuilt import prebuilt

_SOURCES = Path(__file__).parent
_CPU_FILE = Path("/proc/cpuinfo")
# Without contraction a sum is rounded where the source says so, whatever the compiler inlines.
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")
_COMPILE_SECONDS = 120


class KernelsUnavailable(Exception):
    """Native kernels cannot be used here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A build for one kind of processor."""

    name: str
    needs: frozenset[str]
    """Flags of /proc/cpuinfo."""
    flags: tuple[str, ...]
    """Of the compiler."""
    uses_tiles: bool = False


_V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_TILES = {"amx_tile", "amx_bf16", "avx512_bf16", "avx512_fp16"}
_V4_FLAGS = ("-march=x86-64-v4", "-mprefer-vector-width=512")

VARIANTS = (
    Variant(
        name="amx",
        needs=_V4 | _TILES,
        flags=(*_V4_FLAGS, "-mavx512bf16", "-mavx512fp16", "-mamx-tile", "-mamx-bf16"),
        uses_tiles=True,
    ),
    Variant(name="avx512", needs=_V4, flags=_V4_FLAGS),
    Variant(name="avx2", needs=_V3, flags=("-march=x86-64-v3",)),
)
"""Best first."""


def supported_variants() -> tuple[Variant, ...]:
    """What this machine's processor can run, best first."""
    flags = _cpu_flags()
    return tuple(variant for variant in VARIANTS if variant.needs <= flags)


@cache
def load(variant: Variant) -> ctypes.CDLL:
    """The variant's library, built if need be. Raises KernelsUnavailable."""
    missing = sorted(variant.needs - _cpu_flags())
    if missing:
        raise KernelsUnavailable(f"this processor has no {', '.join(missing)}")
    try:
        library = ctypes.CDLL(str(build(variant)))
    except OSError as error:
        raise KernelsUnavailable(f"the built library cannot be loaded: {error}") from error
    if not library.conclave_ready(int(variant.uses_tiles)):
        raise KernelsUnavailable("the operating system does not let this process use AMX tiles")
    return library


def build(variant: Variant) -> Path:
    """Path of the variant's library: prebuilt, or in the cache. Raises KernelsUnavailable."""
    if (ready := prebuilt(_prebuilt_name(variant))) is not None:
        return ready
    command = _command(variant)
    # A compiler that was replaced has another size or time; asking for its version takes longer.
    compiler = os.stat(command[0])
    made_by = repr((command, compiler.st_size, compiler.st_mtime_ns))
    target = cache_folder() / f"{variant.name}-{_digest(made_by)}.so"
    if not _is_ours(target, stat.S_ISREG):
        _compile_to(command, target)
    return target


def build_into(variant: Variant, folder: Path) -> Path:
    """Compile for machines without a compiler, whichever processor this one has.

    Raises KernelsUnavailable.
    """
    target = folder / _prebuilt_name(variant)
    _compile_to(_command(variant), target)
    target.chmod(0o644)
    return target


def _prebuilt_name(variant: Variant) -> str:
    return f"{variant.name}-{_digest(repr((*_FLAGS, *variant.flags)))}.so"


def _command(variant: Variant) -> list[str]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise KernelsUnavailable("there is no C compiler (cc)")
    return [compiler, *_FLAGS, *variant.flags]


def _compile_to(command: list[str], target: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".unfinished")
    os.close(handle)
    try:
        _compile_all(command, unfinished)
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _compile_all(command: list[str], target: str) -> None:
    """Each source by itself, as many at once as there are cores: six seconds on one."""
    sources = sorted(_SOURCES.glob("*.c"))
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(cores) as pool:
        objects = [f"{scratch}/{source.stem}.o" for source in sources]
        commands = [
            [*command, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        for _ in pool.map(_compile, commands):
            continue
        _compile([*command, "-o", target, *objects, "-ldl"])


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KernelsUnavailable(f"{command[0]} cannot compile them: {reason[0]}")


def cache_folder() -> Path:
    """A folder that only this user can write to: under ~/.cache, else among temporary files.

    Raises KernelsUnavailable where there is neither.
    """
    for folder in _cache_candidates():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if _is_ours(folder, stat.S_ISDIR) and os.access(folder, os.W_OK):
            return folder
    raise KernelsUnavailable("there is no private folder to keep them in")


def _cache_candidates() -> Iterable[Path]:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        yield Path(base) / "conclave" / "kernels"
    with suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "conclave" / "kernels"
    yield Path(tempfile.gettempdir()) / f"conclave-kernels-{os.geteuid()}"


def _is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is there, no link, owned by this user and writable by nobody else."""
    try:
        found = path.lstat()
    except OSError:
        return False
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not shared


def _digest(made_by: str) -> str:
    """Of the sources, and of what makes a library of them."""
    digest = hashlib.sha256()
    for path in sorted([*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(made_by.encode())
    return digest.hexdigest()[:32]


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = _CPU_FILE.read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()
