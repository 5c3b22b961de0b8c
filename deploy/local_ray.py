"""A Ray of our own on this machine, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from deploy import guardian
from deploy.log_relay import relayed_logs
from shards.logs import RUNTIME_FOLDER


def joins_cluster() -> bool:
    """Whether a session is one of a cluster that somebody else has started."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def ray_session(
    num_cpus: float, log_level: str = "warning", *, shows_logs: bool = False
) -> Iterator[None]:
    """Ray connected on entry, gone without trace on exit (also after SIGKILL, if it is ours).

    A Ray of our own has at least `num_cpus` CPUs on its books, so that every actor is placed.
    With `shows_logs` the lines of a Ray of our own come to standard error here.
    The main thread must enter: Ray's processes die with the thread that started them.
    """
    session = _joined_cluster() if joins_cluster() else _own_ray(num_cpus, log_level, shows_logs)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with session:
        # Ray takes the signals over; the command line's own handlers drain first.
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _quieten(log_level)
        yield


@contextmanager
def _joined_cluster() -> Iterator[None]:
    import ray

    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray(num_cpus: float, log_level: str, shows_logs: bool) -> Iterator[None]:
    # Short: Ray's socket paths below it must fit into 107 characters.
    folder = tempfile.mkdtemp(prefix="cv-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    watcher = _start_guardian(folder)
    environment = dict(os.environ)
    try:
        with relayed_logs(folder) if shows_logs else nullcontext():
            _start_ray(folder, num_cpus, log_level)
            import ray

            try:
                yield
            finally:
                ray.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(environment)
        # The guardian cleans up once its pipe is closed.
        assert watcher.stdin is not None
        watcher.stdin.close()
        watcher.wait()


def _start_ray(folder: str, num_cpus: float, log_level: str) -> None:
    _set_environment(folder)
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)),
            include_dashboard=False,
            log_to_driver=log_level == "debug",
            logging_level=logging.ERROR,
            configure_logging=log_level == "debug",
            _temp_dir=folder,
        )
    except SystemExit as error:  # Ray's own signal handler, in place until `init` has returned
        raise KeyboardInterrupt from error


def _quieten(log_level: str) -> None:
    """Ray's and Serve's progress messages are for those who ask for them."""
    if log_level in ("debug", "info"):
        return
    import ray.serve  # it configures its logger when imported

    for name in ("ray", ray.serve.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)


def _start_guardian(folder: str) -> subprocess.Popen[bytes]:
    # -I -S: no site packages, it starts in 20 ms. A session of its own: Ctrl-C is not for it.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _set_environment(folder: str) -> None:
    """For Ray's processes and the workers below them."""
    settings = {
        RUNTIME_FOLDER: folder,
        # Ray would run workers at nice 15.
        "RAY_worker_niceness": "0",
        # Many small actors start at once; Ray's default is one per core and a warning.
        "RAY_worker_maximum_startup_concurrency": "32",
        # A token that only our own processes know: other users cannot reach this Ray.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.proxy_request_id:middlewares",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    os.environ[RUNTIME_FOLDER] = folder
    # Workers import these packages from where we did.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
