"""`conclave serve`: Ray, Serve and one application in the foreground, until a signal."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from deploy.config import ConfigError, ServeArgs
from deploy.local_ray import joins_cluster, ray_session
from deploy.replica_start import ReplicaStart
from deploy.reservation import num_cpus
from deploy.resolve import ResolvedArgs, resolve
from deploy.startup_profile import CommandClock, startup_json, startup_parts, startup_table
from deploy.tell import tell
from shards.client import GroupFailed

log = logging.getLogger("conclave.server")

_EXIT_INTERRUPTED = 130
_WATCH_S = 5.0


def application_name(model_name: str) -> str:
    """A model's name as Serve can hold it: its metrics take ASCII only."""
    return re.sub(r"[^\x20-\x7e]", "_", model_name)


class _Signals:
    """Remembers the first SIGTERM or SIGINT; a second one while draining is not waited for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._event = threading.Event()

    def install(self) -> None:
        """Take both signals over."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def wait(self, watch: Callable[[], None]) -> None:
        """Block until a signal; `watch` is called now and then."""
        while not self._event.wait(_WATCH_S):
            watch()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._event.is_set() or not self.serving:
            raise KeyboardInterrupt
        self._event.set()

    serving = False
    """Before it serves there is nothing to drain: a signal interrupts at once."""


class _FailureWatch:
    """Says once, in this process's log, that the model instance has failed and why.

    The replica that knows is another process, whose own log is in Ray's folder.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._told = ""

    def __call__(self) -> None:
        """Ask; a server that does not answer says nothing about the model."""
        try:
            with urllib.request.urlopen(self._url, timeout=_WATCH_S):
                return
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
        except OSError:
            return
        if body != self._told:
            log.error("the server is not healthy: %s", body[:500])
            self._told = body


def _unwatched() -> None:
    """Of a model that may have no replica nobody asks."""


def _print_choices(url: str, api_keys: tuple[str, ...]) -> None:
    """Say what a replica has chosen by itself: its kernels, threads and caches."""
    try:
        version = _ask(f"{url}/version", api_keys)
        caches = _ask(f"{url}/v1/experts", api_keys)["kv_cache"]
    except (OSError, HTTPException, ValueError) as error:
        log.warning("what the replica has chosen cannot be asked for: %s", error)
        return
    threads = f"threads per actor: {version['threads']}"
    tell(f"kernels: {version['kernels']}, {threads}")
    tell(caches)


def _ask(url: str, api_keys: tuple[str, ...]) -> Any:
    request = urllib.request.Request(url)
    if api_keys:
        request.add_header("Authorization", f"Bearer {api_keys[0]}")
    with urllib.request.urlopen(request, timeout=_WATCH_S) as response:
        return json.load(response)


def _check_port(host: str, port: int) -> None:
    """Raises OSError at once where Serve would need half a minute to say so."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _check_nodes(nodes: int | None) -> None:
    """Raises ConfigError where Ray would wait for ever for other nodes."""
    if (nodes or 1) > 1 and not joins_cluster():
        raise ConfigError(
            f"nodes={nodes}: allowed values are 1 with a Ray of its own; RAY_ADDRESS names a "
            "cluster to serve on"
        )


def _drain(name: str) -> None:
    """Take the application away once its requests have ended.

    Serve itself ends with our Ray; on a shared cluster it stays for the others. (Shutting it down
    at once would cut running streams.)
    """
    from ray import serve

    serve.delete(name, _blocking=False)
    while name in serve.status().applications:
        time.sleep(0.1)


def _run(resolved: ResolvedArgs) -> None:
    """Start the application and wait for it, showing how far its loading is."""
    from ray import serve

    from deploy.app import application
    from deploy.load_bar import loading_shown
    from shards.checkpoint import open_model
    from shards.load_board import bytes_read, open_board
    from shards.load_plan import plan_loading

    name = application_name(resolved.served_model_name)
    loads = plan_loading(resolved.spec, *open_model(resolved.model_path))
    total = max(1, resolved.min_replicas) * sum(load.num_bytes for load in loads)
    board = f"conclave/{name}"  # what the names of its actors begin with
    with (
        open_board(board),
        loading_shown(resolved.served_model_name, total, lambda: bytes_read(board)),
    ):
        try:
            serve.run(application(resolved), name=name)
        except RuntimeError as error:
            raise RuntimeError(_failure_of(name) or str(error)) from error


def _failure_of(name: str) -> str:
    """What the model instance of an application failed of; Serve's own error does not say it."""
    from ray import serve

    status = serve.status().applications.get(name)
    messages = [each.message for each in status.deployments.values()] if status else []
    found = re.search(rf"\b{GroupFailed.__name__}: (.+)", "\n".join(messages))
    return found[1] if found else ""


def _print_profile(clock: CommandClock, name: str, file: Path | None) -> None:
    """What the start took, as a table on standard error and as JSON in a file."""
    from ray import serve

    try:
        answer = serve.get_app_handle(name).startup.remote().result(timeout_s=_WATCH_S)
    except Exception as error:  # Ray raises many kinds; the server serves all the same
        log.warning("what the start took cannot be asked for: %s", error)
        return
    replica = msgspec.convert(answer, ReplicaStart)
    parts = startup_parts(clock.parts, replica)
    print(startup_table(parts, replica), file=sys.stderr, flush=True)
    if file is not None:
        try:
            file.write_text(startup_json(parts, replica), encoding="utf-8")
        except OSError as error:
            log.warning("the profile of the start cannot be written: %s", error)


def serve_forever(
    args: ServeArgs,
    host: str,
    port: int,
    *,
    profile_startup: bool = False,
    profile_file: Path | None = None,
) -> int:
    """Serve until SIGTERM (0) or SIGINT (130); 1 when the model cannot be started.

    A signal before it serves, or a second one while it drains, ends it at once (130).

    Raises ConfigError before anything is started.
    """
    clock = CommandClock()
    resolved = resolve(args)
    _check_nodes(resolved.spec.num_nodes)
    try:
        _check_port(host, port)
    except OSError as error:
        tell(f"cannot listen on {host}:{port}: {error.strerror}", logging.ERROR)
        return 1
    signals = _Signals()
    signals.install()
    clock.mark("checks")
    try:
        shows_logs = args.log_level in ("debug", "info") or args.log_format == "json"
        with ray_session(num_cpus(resolved), args.log_level, shows_logs=shows_logs):
            from ray import serve

            clock.mark("Ray")
            try:
                serve.start(http_options={"host": host, "port": port})
                clock.mark("Serve")
                _run(resolved)
            except Exception as error:
                tell(f"cannot serve: {error}", logging.ERROR)
                return 1
            clock.mark("application")
            signals.serving = True
            url = f"http://{host}:{port}"
            _print_choices(url, resolved.api_keys)
            if profile_startup or profile_file is not None:
                clock.mark("ready")
                name = application_name(resolved.served_model_name)
                _print_profile(clock, name, profile_file)
            print(f"ready on {url}", flush=True)
            # Asking after its health would keep the last replica, or start it again.
            watch = _FailureWatch(f"{url}/health") if resolved.min_replicas else _unwatched
            signals.wait(watch)
            _drain(application_name(resolved.served_model_name))
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    return 0 if signals.received == signal.SIGTERM else _EXIT_INTERRUPTED
