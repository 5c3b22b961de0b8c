"""On the path of a test's workers only: a stage that computes a certain token kills itself."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

POISON_TOKEN = 499
TARGET = "shards.model_runner"


def poison(module: ModuleType) -> None:
    """Have `ModelRunner.execute` die of every plan that computes a poisoned prompt."""
    execute = module.ModelRunner.execute
    poisoned: set[int] = set()

    def deadly(self: Any, plan: Any, *args: Any, **options: Any) -> Any:
        poisoned.update(new.seq_id for new in plan.new if POISON_TOKEN in new.prompt)
        if any(row.seq_id in poisoned for row in plan.scheduled):
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(self, plan, *args, **options)

    module.ModelRunner.execute = deadly


class Finder(importlib.abc.MetaPathFinder):
    """Runs `poison` once the target has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            poison(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
