"""Free memory as made-up machines show it: bare, in containers, under nested cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.memory import CgroupMemory, free_bytes, least_free

KIB, MIB = 1024, 1024**2
MEMINFO = "MemTotal: 8192 kB\nMemFree: 1 kB\nMemAvailable:    4096 kB\nCached: 9 kB\n"
NO_LIMIT_V1 = "9223372036854771712\n"
V2 = "35 25 0:30 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 25 0:30 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
OTHERS = (
    "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n36 25 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
)


class Machine:
    """A folder with the files that Linux would show."""

    def __init__(self, root: Path, cgroup: str, mounts: str, meminfo: str = MEMINFO) -> None:
        self.root = root
        self.write("proc/meminfo", meminfo)
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", f"{OTHERS}\n{mounts}\n")

    def write(self, file: str, text: str) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def v2(self, folder: str, limit: str, used: int, *, cached: int = 0, high: str = "max") -> None:
        base = f"sys/fs/cgroup{folder}"
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.high", f"{high}\n")
        self.write(f"{base}/memory.current", f"{used}\n")
        stat = f"anon 1\nfile 77\nactive_file 5\ninactive_file {cached}\nzswap 3\n"
        self.write(f"{base}/memory.stat", stat)

    def v1(self, folder: str, limit: str, used: int, *, cached: int = 0) -> None:
        base = f"sys/fs/cgroup/memory{folder}"
        self.write(f"{base}/memory.limit_in_bytes", limit)
        self.write(f"{base}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 12345\ntotal_cache 9\ntotal_inactive_file {cached}\n"
        self.write(f"{base}/memory.stat", stat)


def test_without_cgroups_it_is_what_the_kernel_has_available(tmp_path: Path) -> None:
    assert free_bytes(Machine(tmp_path, "0::/\n", V2.format(root="/")).root) == 4 * MIB


def test_every_ancestor_of_version_2_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/a/b/c\n", V2.format(root="/"))
    machine.v2("/a/b/c", "max", 5)
    machine.v2("/a/b", str(3 * MIB), MIB)
    machine.v2("/a/other", "0", 0)
    assert free_bytes(machine.root) == 2 * MIB
    machine.v2("/a", str(3 * MIB), 2 * MIB)
    assert free_bytes(machine.root) == MIB
    machine.v2("/a", str(3 * MIB), 2 * MIB, cached=KIB)
    assert free_bytes(machine.root) == MIB + KIB
    machine.v2("/a/b/c", "max", 100 * KIB, high=str(101 * KIB))
    assert free_bytes(machine.root) == KIB
    machine.v2("/a/b/c", str(KIB), 2 * KIB)
    assert free_bytes(machine.root) == 0


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n", V2.format(root="/"))
    machine.v2("", str(2 * MIB), MIB)
    assert free_bytes(machine.root) == MIB


@pytest.mark.parametrize(
    ("root", "path"), [("/docker/x", "/docker/x"), ("/docker/x", "/docker/y"), ("/", "/../../z")]
)
def test_paths_that_are_not_below_the_mount_mean_the_mount(
    root: str, path: str, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, f"4:memory:{path}\n", V1.format(root=root))
    machine.v1("", str(3 * MIB), MIB)
    machine.v1(path, "1", 0)
    machine.v1("/..", "1", 0)
    assert free_bytes(machine.root) == 2 * MIB


def test_every_ancestor_of_version_1_counts(tmp_path: Path) -> None:
    groups = "9:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:/pods/p/inner\n1:name=systemd:/q\n0::/u\n"
    machine = Machine(tmp_path, groups, V1.format(root="/pods"))
    machine.v1("", NO_LIMIT_V1, 7 * MIB)
    machine.v1("/p/inner", NO_LIMIT_V1, 1)
    assert free_bytes(machine.root) == 4 * MIB
    machine.v1("/p", str(2 * MIB), 2 * MIB - KIB, cached=3 * KIB)
    assert free_bytes(machine.root) == 4 * KIB
    machine.v1("/../cpu/pods/p/inner", "1", 0)
    machine.v1("/../cpu/elsewhere", "1", 0)
    assert free_bytes(machine.root) == 4 * KIB, "only what counts memory says something about it"


def test_both_versions_at_once_give_the_lesser(tmp_path: Path) -> None:
    mounts = V1.format(root="/") + "\n" + V2.format(root="/").replace("cgroup rw", "cgroup/u rw")
    machine = Machine(tmp_path, "4:memory:/m\n0::/v\n", mounts)
    machine.v1("/m", str(2 * MIB), 0)
    machine.v2("/u/v", str(3 * MIB), 0)
    assert free_bytes(machine.root) == 2 * MIB
    machine.v2("/u/v", str(MIB), 0)
    assert free_bytes(machine.root) == MIB


def test_what_cannot_be_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/proc/meminfo cannot be read"):
        free_bytes(tmp_path)
    with pytest.raises(ValueError, match="no MemAvailable"):
        least_free("MemTotal: 5 kB\n", ())


def test_the_least_room_counts_and_never_less_than_none() -> None:
    roomy, tight = CgroupMemory(9 * MIB, 3 * MIB, 0), CgroupMemory(MIB, MIB, 10)
    assert least_free(MEMINFO, (roomy,)) == 4 * MIB
    assert least_free(MEMINFO, (roomy, tight)) == 10
    assert least_free(MEMINFO, (CgroupMemory(5, 6, 0),)) == 0


def test_this_machine_has_some() -> None:
    total = next(
        int(line.split()[1]) * KIB
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert 0 < free_bytes() < total
