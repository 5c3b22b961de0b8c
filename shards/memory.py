"""How much memory this process's machine has left, as the kernel and the cgroups around it see it.

Files: proc(5); Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """One cgroup: its limit, what it uses, and what of that the kernel can take back, in bytes."""

    limit: int
    used: int
    reclaimable: int


@dataclass(frozen=True, slots=True)
class CgroupFolder:
    """Where a cgroup's files are, and of which version they are."""

    path: PurePosixPath
    version: int


# The least of the limits counts; `high` slows a process down until it is as good as dead.
_LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
_USED = {1: "memory.usage_in_bytes", 2: "memory.current"}
# Of the whole subtree, as the use is.
_RECLAIMABLE = {1: "total_inactive_file", 2: "inactive_file"}


def least_free(meminfo: str, cgroups: Iterable[CgroupMemory]) -> int:
    """Bytes that can still be used: what /proc/meminfo has available, and room in every cgroup.

    Raises ValueError when `meminfo` does not say it.
    """
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    if available is None:
        raise ValueError("/proc/meminfo has no MemAvailable")
    rooms = (group.limit - group.used + group.reclaimable for group in cgroups)
    return max(0, min([1024 * int(available[1]), *rooms]))


def cgroup_folders(cgroup: str, mountinfo: str) -> Iterator[CgroupFolder]:
    """The process's own cgroups that count memory, and all of their ancestors that are mounted.

    Takes the text of /proc/self/cgroup and of /proc/self/mountinfo.
    """
    paths = {
        2 if controllers == "" else 1: path
        for _, controllers, path in (line.split(":", 2) for line in cgroup.splitlines())
        if controllers == "" or "memory" in controllers.split(",")
    }
    for line in mountinfo.splitlines():
        mounted, _, source = line.partition(" - ")
        root, mount_point = mounted.split(" ")[3:5]
        kind, _, options = source.split(" ", 2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version not in paths or (version == 1 and "memory" not in options.split(",")):
            continue
        folder = PurePosixPath(mount_point, *_below(root, paths[version]))
        while folder.is_relative_to(mount_point):
            yield CgroupFolder(folder, version)
            if folder == PurePosixPath(mount_point):
                break
            folder = folder.parent


def _below(root: str, path: str) -> tuple[str, ...]:
    """A cgroup's path under the part of the tree that is mounted; empty when it is outside."""
    own = PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(root):
        return ()
    return own.relative_to(root).parts


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process's machine has left. Raises ValueError if nothing says so.

    `root` is where /proc and /sys are found.
    """
    proc = root / "proc"
    meminfo = _text(proc / "meminfo")
    if meminfo is None:
        raise ValueError("/proc/meminfo cannot be read")
    folders = cgroup_folders(
        _text(proc / "self" / "cgroup") or "", _text(proc / "self" / "mountinfo") or ""
    )
    found = (_read_cgroup(root, folder) for folder in folders)
    return least_free(meminfo, (group for group in found if group is not None))


def _read_cgroup(root: Path, folder: CgroupFolder) -> CgroupMemory | None:
    """One cgroup, or None without a limit: the root of version 2 has none of these files."""
    path = root / folder.path.relative_to("/")
    texts = (_text(path / name) for name in _LIMITS[folder.version])
    limits = [int(text) for text in texts if text is not None and text.strip() != "max"]
    used = _text(path / _USED[folder.version])
    if not limits or used is None:
        return None
    key = _RECLAIMABLE[folder.version]
    cached = re.search(rf"^{key} (\d+)$", _text(path / "memory.stat") or "", re.MULTILINE)
    return CgroupMemory(min(limits), int(used), int(cached[1]) if cached else 0)


def _text(file: Path) -> str | None:
    """A file's content; None when it is not there or not for us to see."""
    try:
        return file.read_text()
    except OSError:
        return None
