"""A running replica's settings: Serve hands over a `user_config`, requests go on."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

from deploy.config import ConfigError
from deploy.printable import printable
from deploy.service import ApiService
from deploy.user_config import apply, parse_user_config

log = logging.getLogger("conclave.ingress")


class LiveSettings:
    """Every `user_config` is laid over the options anew, never over the one before it."""

    def __init__(self, service: ApiService) -> None:
        self._service = service
        self._options = self._in_force = service.settings
        self._turn = asyncio.Lock()

    async def change(self, user_config: object) -> None:
        """Take a configuration over for requests that begin from now on; a bad one for none.

        Never raises for a bad one: Serve would stop this replica, which serves well.
        """
        async with self._turn:
            try:
                config = parse_user_config(user_config)
                settings = await asyncio.to_thread(apply, config, self._options)
            except ConfigError as error:
                log.error("%s; what was in force stays", printable(str(error)))
                said = {**self._in_force.shown, "user_config_refused": str(error)}
                self._service.adopt(replace(self._in_force, shown=said))
                return
            self._service.adopt(settings)
            self._in_force = settings


def initial_user_config(context: Any) -> object:
    """What Serve is about to hand to a replica that starts; None where there is nothing.

    Its own check would come after the weights are read.
    """
    deployment = getattr(context, "_deployment_config", None)
    return getattr(deployment, "user_config", None)
