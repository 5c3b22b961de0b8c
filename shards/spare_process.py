"""What a spare process does before it knows which worker it will be."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from shards.cores import sleep_while_waiting
from shards.role_modules import import_every_role
from shards.spec import GroupSpec

log = logging.getLogger("conclave.spare")

_LEAST_PRIORITY = 19


def warm_up(group: GroupSpec) -> None:
    """Import what any worker of the group imports and load its kernels, in nobody's way.

    Linux keeps the priority of each thread: a thread of its own is nice, and this one stays as it
    is, because no process without privileges could take its niceness back.
    """
    if group.crowded:
        sleep_while_waiting()
    thread = threading.Thread(target=_warm_up, args=(group,), name="conclave-warm-up")
    thread.start()
    thread.join()


def _warm_up(group: GroupSpec) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
    import_every_role()

    import torch

    from models.kernels.native import use_kernels
    from models.registry import load_config

    try:
        with torch.device("meta"):  # imports the family's layers, and what PyTorch needs first
            load_config(Path(group.model_path)).build_stage(0, 1, torch.float32)
        use_kernels(group.kernels)
    except (ValueError, OSError) as error:
        # Whatever worker it becomes will refuse to start with the same words.
        log.warning("a spare cannot warm up: %s", error)
