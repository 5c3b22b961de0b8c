"""The engines behind their own OpenAI servers, one server at a time, streamed over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError
from typing import IO, Any

from benchmarks.peers.http_client import HOST, is_up, stream_all
from benchmarks.peers.options import Options
from benchmarks.peers.processes import Failed, environ_of, interpreter
from benchmarks.peers.timings import figures, medians
from benchmarks.peers.vocabulary import write_tokenizer

START_TIMEOUT = 240.0
END_TIMEOUT = 60.0


def command(engine: str, python: Path, folder: Path, port: int, options: Options) -> list[str]:
    """How each server is started: its defaults, but for threads and room for the requests."""
    batch, length = max(options.batches), max(options.prompts) + options.tokens + 16
    if engine == "conclave":
        return [str(python), "-m", "deploy.cli", "serve", str(folder), "--port", str(port),
                "--executor", "local", "--threads", str(options.threads),
                "--max-num-seqs", str(batch), "--max-model-len", str(length),
                "--no-enable-prefix-caching"]  # fmt: skip
    if engine == "vllm":
        return [str(python), "-m", "benchmarks.peers.vllm_server", "--model", str(folder),
                "--host", HOST, "--port", str(port), "--dtype", "bfloat16", "--enforce-eager",
                "--max-model-len", str(length), "--max-num-seqs", str(batch),
                "--no-enable-prefix-caching"]  # fmt: skip
    if engine == "llamacpp":
        return [str(python), "-m", "llama_cpp.server", "--model", str(folder / "bfloat16.gguf"),
                "--host", HOST, "--port", str(port), "--n_ctx", str(length),
                "--n_threads", str(options.threads), "--n_threads_batch", str(options.threads),
                "--interrupt_requests", "False", "--verbose", "False"]  # fmt: skip
    return [str(python), "-m", "transformers.cli.transformers", "serve", str(folder),
            "--host", HOST, "--port", str(port), "--device", "cpu",
            "--dtype", "bfloat16"]  # fmt: skip


def measure_servers(
    engines: list[str], folder: Path, vocab: int, options: Options, log: IO[bytes]
) -> dict[str, Any]:
    """By engine: a list of cells, or the reason why there are none."""
    write_tokenizer(folder, vocab)
    found: dict[str, Any] = {}
    for engine in engines:
        try:
            found[engine] = _measure(engine, folder, vocab, options, log)
        except (Failed, RuntimeError, OSError, TimeoutError, CalledProcessError) as failure:
            found[engine] = f"fails: {failure}"
            print(f"{engine:13} server {found[engine]}", flush=True)
    return found


def _measure(
    engine: str, folder: Path, vocab: int, options: Options, log: IO[bytes]
) -> list[dict[str, Any]]:
    python = interpreter(engine, options.environments)
    assert python is not None
    if engine == "transformers" and find_spec("accelerate") is None:
        raise Failed("`transformers serve` needs accelerate, which is not installed")
    gguf = folder / "bfloat16.gguf"
    if engine == "llamacpp" and not gguf.exists():
        write = [*map(str, (python, "-m", "benchmarks.peers.gguf_file", folder, gguf)), "bfloat16"]
        subprocess.run(write, check=True, env=environ_of(options.threads))
    port = _free_port()
    server = subprocess.Popen(
        command(engine, python, folder, port, options),
        stdout=log,
        stderr=log,
        env=environ_of(options.threads),
        start_new_session=True,
    )
    try:
        _wait(server, port)
        cells = []
        for batch in options.batches:
            cells.append(_cell(engine, port, batch, folder, vocab, options))
            print(server_line(engine, cells[-1]), flush=True)
        return cells
    finally:
        _end(server)


def server_line(engine: str, cell: dict[str, Any]) -> str:
    """One cell as it is printed."""
    times = [cell[f"{name}"] * 1e3 for name in ("first_token_p50", "inter_token_p50")]
    return (
        f"{engine:13} server, {cell['clients']:3} clients: {cell['tokens_per_second']:7.1f} tok/s, "
        f"first token {times[0]:.0f} ms, between {times[1]:.1f} / "
        f"{cell['inter_token_p99'] * 1e3:.1f} ms"
    )


def _cell(
    engine: str, port: int, batch: int, folder: Path, vocab: int, options: Options
) -> dict[str, Any]:
    prompt = min(options.prompts)
    runs, rates = [], []
    for turn in range(options.rounds + 1):
        bodies = [
            _body(engine, folder, prompt, vocab, options.tokens if turn else 3, 1000 * turn + i)
            for i in range(batch)
        ]
        times = stream_all(port, bodies)
        if turn:
            runs.append(figures(times, prompt))
            rates.append(sum(map(len, times)) / max(request[-1] for request in times))
    return {
        "clients": batch,
        "prompt": prompt,
        "rounds": options.rounds,
        "tokens_per_second": sorted(rates)[len(rates) // 2],
        **asdict(medians(runs)),
    }


def _body(
    engine: str, folder: Path, length: int, vocab: int, tokens: int, seed: int
) -> dict[str, Any]:
    """Token ids where the server takes them; else words of its tokenizer, or bytes."""
    ids = [300 + (seed * 7919 + 31 * i) % (vocab - 300) for i in range(length)]
    prompt: Any = ids
    if engine == "transformers":
        prompt = " ".join(f"w{i}" for i in ids)
    elif engine == "llamacpp":
        prompt = "".join(chr(97 + i % 26) for i in ids)
    body = {"model": str(folder), "prompt": prompt, "max_tokens": tokens, "stream": True}
    if engine == "conclave":
        body["model"] = folder.name
    if engine in ("conclave", "vllm"):
        body["ignore_eos"] = True
    return {**body, "temperature": 0.0}


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise Failed(f"its server ended with status {server.returncode}")
        if is_up(port):
            return
        time.sleep(0.5)
    raise Failed(f"its server did not answer within {START_TIMEOUT:.0f} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server first; then whatever is left of the session that it leads."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(END_TIMEOUT)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
