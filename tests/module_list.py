"""Which modules a process has imported, asked from outside: any process of this environment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

# Python imports a module of this name by itself when it starts.
_SITE = """
import os, signal, sys
def tell(number, frame):
    folder = {folder!r}
    with open(f"{{folder}}/{{os.getpid()}}.part", "w") as file:
        file.write("\\n".join(sorted(sys.modules)))
    os.rename(f"{{folder}}/{{os.getpid()}}.part", f"{{folder}}/{{os.getpid()}}.modules")
signal.signal(signal.SIGUSR2, tell)
"""


def telling_environment(folder: Path) -> dict[str, str]:
    """Environment of processes that `modules_of` can ask; `folder` is for nothing else."""
    (folder / "sitecustomize.py").write_text(_SITE.format(folder=str(folder)))
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def modules_of(pid: int, folder: Path, seconds: float = 20.0) -> set[str]:
    """What is in the process's `sys.modules` now."""
    answer = folder / f"{pid}.modules"
    os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + seconds
    while not answer.exists():
        assert time.monotonic() < deadline, f"{pid} does not say what it has imported"
        time.sleep(0.02)
    return set(answer.read_text().split())
