"""What each kind of worker imports, and nothing that it does not need."""

from __future__ import annotations

from importlib import import_module

from shards.spec import GroupSpec, Role

_WEIGHTS = ("models.kernels.native", "shards.checkpoint", "shards.loading", "shards.threads")
_LOCAL = ("shards.engine_worker", "shards.local_executor")
_MODULES = {
    # In front of a pipeline it never imports torch.
    Role.ENGINE: ("shards.engine_worker",),
    Role.STAGE: ("shards.stage_worker", "shards.kv_cache", *_WEIGHTS),
    Role.DISPATCHER: ("shards.dispatcher_worker", "models.kernels.native", "models.registry"),
    Role.EXPERT: ("shards.expert_worker", *_WEIGHTS),
}


def import_role(group: GroupSpec, role: Role) -> None:
    """Import what a worker of this role will use."""
    local = role is Role.ENGINE and group.executor == "local"
    for module in _LOCAL if local else _MODULES[role]:
        import_module(module)


def import_every_role() -> None:
    """The same for all roles and executors: who waits may become any of them."""
    for module in dict.fromkeys((*sum(_MODULES.values(), ()), *_LOCAL)):
        import_module(module)
