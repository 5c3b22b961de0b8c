"""How a server ends: SIGTERM drains, SIGKILL leaves nothing behind, a dead replica comes back."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, serving, wait_until

pytestmark = pytest.mark.e2e

FLAGS = ["nano-dbrx", "--stages", "2", "--expert-shards", "2", "--dtype", "float32"]
LONG = {
    "prompt": [5, 6, 7, 8],
    "max_tokens": 200,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


def _runtime_folder(server: Server) -> Path:
    """The private folder that this server's processes were given."""
    for pid in server.family():
        for item in Path("/proc", str(pid), "environ").read_bytes().split(b"\0"):
            if item.startswith(b"CONCLAVE_RUNTIME_DIR="):
                return Path(item.split(b"=", 1)[1].decode())
    raise AssertionError("no process of the server knows its runtime folder")


def _our_sockets(pids: set[int]) -> set[str]:
    """Inodes of all sockets that these processes hold."""
    found = set()
    for pid in pids:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
        except OSError:
            continue
    return found


def _open_sockets() -> set[str]:
    """Inodes of every Unix and TCP socket of this machine."""
    inodes = set()
    for table, column in (("unix", 6), ("tcp", 9), ("tcp6", 9)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            inodes.add(line.split()[column])
    return inodes


def _nothing_is_left(server: Server, folder: Path, sockets: set[str], shm: set[str]) -> None:
    assert wait_until(lambda: not server.family(), 30), server.family()
    assert wait_until(lambda: not folder.exists(), 10), f"{folder} is still there"
    assert not (sockets - {"0"}) & _open_sockets()
    assert set(os.listdir("/dev/shm")) <= shm


def test_sigterm_finishes_open_streams_and_leaves_nothing(log: Path) -> None:
    shm = set(os.listdir("/dev/shm"))
    with serving(log, *FLAGS) as server:
        folder, sockets = _runtime_folder(server), _our_sockets(server.family())
        lines: list[str] = []
        first = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as r:
                for line in r.iter_lines():
                    lines.append(line)
                    first.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(30)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
        reader.join(timeout=30)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        _nothing_is_left(server, folder, sockets, shm)


def test_sigkill_of_the_server_leaves_nothing(log: Path) -> None:
    shm = set(os.listdir("/dev/shm"))
    with serving(log, *FLAGS) as server:
        folder, sockets = _runtime_folder(server), _our_sockets(server.family())
        assert len(server.family()) > 6
        server.process.kill()
        server.process.wait()
        _nothing_is_left(server, folder, sockets, shm)


def test_workers_killed_behind_a_stream_are_not_noticed(log: Path) -> None:
    with serving(log, *FLAGS, "--expert-replicas", "2") as server:
        expected = _stream(server, None)
        assert expected[-1] == "data: [DONE]"
        for role, index in (("expert", 1), ("stage", 0), ("engine", 0)):
            assert _stream(server, (role, index)) == expected, role
            ready = f"{server.url}/ready"
            assert wait_until(lambda url=ready: httpx.get(url).status_code == 200, 60)


def test_an_expert_comes_back_as_the_spare_that_was_warm(log: Path) -> None:
    with serving(log, *FLAGS) as server:
        assert wait_until(lambda: _warm_spares(server), 60)
        (spare,) = _warm_spares(server)
        expected = _stream(server, None)
        assert _stream(server, ("expert", 1)) == expected
        assert _pid(server, "expert", 1) == spare
        assert wait_until(lambda: _warm_spares(server) - {spare}, 60), "it was not replaced"


def _warm_spares(server: Server) -> set[int]:
    """Ray shows in a process's title what it is, and while it is made also that."""
    titles = {pid: _title(pid) for pid in server.family()}
    return {p for p, t in titles.items() if "ray::SpareActor" in t and "__init__" not in t}


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _stream(server: Server, victim: tuple[str, int] | None) -> list[str]:
    """The stream's token ids and its end; `victim` is killed after the tenth chunk."""
    body = {**LONG, "return_token_ids": True, "logprobs": 1}
    seen: list[str] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=90) as reply:
        for line in filter(None, reply.iter_lines()):
            # Everything but the request's own id and time of creation must be the same.
            seen.append(line.split('"choices"', 1)[-1])
            if victim and len(seen) == 10:
                os.kill(_pid(server, *victim), signal.SIGKILL)
    return seen


def _pid(server: Server, role: str, index: int) -> int:
    actors = httpx.get(f"{server.url}/v1/experts").json()["actors"]
    return next(int(a["pid"]) for a in actors if (a["role"], a["index"]) == (role, index))
