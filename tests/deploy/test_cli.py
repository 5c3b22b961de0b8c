"""Exit codes and messages of the command line, and the guardian that cleans up after a kill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy import guardian
from deploy import server as server_module
from deploy.version import VERSION

ROOT = Path(__file__).resolve().parents[2]


def conclave(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["fly", "nano-dbrx"], "fly"),
        (["serve"], "model"),
        (["serve", "nano-dbrx", "nano-jamba"], "nano-dbrx nano-jamba"),
        (["serve", "nano-dbrx", "--frobnicate"], "--frobnicate"),
        (["serve", "nano-dbrx", "--port", "0"], "port=0"),
        (["serve", "/nonexistent"], "/nonexistent"),
        (["serve", "nano-dbrx", "--device", "cuda"], "device=cuda"),
        (["serve", "nano-dbrx", "--stages", "99"], "stages=99"),
        (["serve", "nano-dbrx", "--config", "/nonexistent"], "config=/nonexistent"),
    ],
)
def test_usage_errors_are_one_sentence(args: list[str], word: str) -> None:
    done = conclave(*args)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_many_nodes_need_a_cluster() -> None:
    done = conclave("serve", "nano-dbrx", "--stages", "2", "--expert-shards", "2", "--nodes", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nodes=2: allowed values are 1 with a Ray of its own; RAY_ADDRESS" in done.stderr
    assert done.stderr.count("\n") == 1


def test_config_file_and_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("stages: 99\nexpert-shards: 2\n")
    assert "stages=99" in conclave("serve", "nano-dbrx", "--config", str(file)).stderr
    assert (
        "stages=98"
        in conclave("serve", "nano-dbrx", "--config", str(file), "--stages", "98").stderr
    )
    file.write_text("port: 70000\n")
    assert "port=70000" in conclave("serve", "nano-dbrx", "--config", str(file)).stderr
    file.write_text("host: 5\n")
    assert "host=5" in conclave("serve", "nano-dbrx", "--config", str(file)).stderr
    file.write_text("- a")
    assert "mapping" in conclave("serve", "nano-dbrx", "--config", str(file)).stderr


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only a key that is fine leaves the other mistake to be named.
    for key, word in (("k1\n", "stages=99"), ("k1\r\n", "stages=99"), ("k1 \n", "api_key")):
        monkeypatch.setenv("CONCLAVE_API_KEY", key)
        done = conclave("serve", "nano-dbrx", "--stages", "99")
        assert done.returncode == 2
        assert word in done.stderr


class _Garbled(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def test_a_server_lives_on_when_its_choices_cannot_be_shown(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with HTTPServer(("127.0.0.1", 0), _Garbled) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            server_module._print_choices(f"http://127.0.0.1:{server.server_port}", ("k",))
            server_module._print_choices(f"http://127.0.0.1:{server.server_port}", ("ключ",))
        finally:
            server.shutdown()
            serving.join()
    assert capsys.readouterr().err.count("kernels") == 0
    assert len([line for line in caplog.messages if "cannot be asked for" in line]) == 2


def test_check(tmp_path: Path) -> None:
    good = conclave("check", "nano-phimoe")
    assert good.returncode == 0
    assert "phimoe" in good.stdout
    bad = conclave("check", str(tmp_path))
    assert bad.returncode == 1
    assert "config.json" in bad.stdout


def test_failures_are_json_where_the_log_is() -> None:
    for args, words in (
        (["nano-dbrx", "--stages", "99"], "stages=99: "),
        (["/nonexistent"], "model=/nonexistent: "),
    ):
        done = conclave("serve", *args, "--log-format", "json")
        assert done.returncode == 2
        [line] = map(json.loads, done.stderr.splitlines())
        assert line["message"].startswith(words)


def test_port_in_use(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = conclave("serve", "nano-dbrx", "--port", str(taken.getsockname()[1]))
        file = tmp_path / "c.yaml"
        file.write_text(f"host: localhost\nport: {taken.getsockname()[1]}\n")
        by_file = conclave("serve", "nano-dbrx", "--config", str(file), "--host", "127.0.0.1")
        json_lines = conclave("serve", "nano-dbrx", "--config", str(file), "--log-format", "json")
    assert (done.returncode, by_file.returncode) == (1, 1)
    assert "cannot listen" in done.stderr
    # The port is the file's, the address the command line's.
    assert by_file.stderr == done.stderr
    assert json_lines.returncode == 1
    [line] = map(json.loads, json_lines.stderr.splitlines())
    assert (line["level"], line["logger"]) == ("error", "conclave.cli")
    assert line["message"].startswith("cannot listen on localhost:")


def test_a_usage_error_needs_no_heavy_import() -> None:
    code = (
        "import sys, deploy.cli, deploy.config; "
        "print([m for m in ('torch', 'ray', 'fastapi', 'openai') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_replica_code_imports_without_torch() -> None:
    code = (
        "import sys, deploy.app, shards.group, shards.ray_launcher; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_version_is_the_projects() -> None:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found is not None
    assert found[1] == VERSION


def test_guardian_ends_what_is_left_and_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (folder / "log").open("w") as log:
        left_over = subprocess.Popen(sleeper, stdout=log)
    stranger = subprocess.Popen(sleeper)
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(folder)], stdin=subprocess.PIPE
        )
        assert watcher.stdin is not None
        time.sleep(0.2)
        assert left_over.poll() is None
        assert os.listdir(folder) == ["log"]
        watcher.stdin.close()
        assert watcher.wait(timeout=30) == 0
        assert left_over.wait(timeout=5) == -9
        assert stranger.poll() is None
        assert not folder.exists()
    finally:
        for process in (left_over, stranger):
            process.kill()
            process.wait()
