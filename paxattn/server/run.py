"""The server that runs the application."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.applications import Starlette

_READING = 5  # seconds that clients have to read how their requests ended


class Server(uvicorn.Server):
    """uvicorn's, which ends requests whose time is up and tells their clients, before it goes."""

    def __init__(self, app: Starlette, *, grace: float) -> None:
        """``app``: of `create_app`; ``grace``: seconds that requests have from a signal on."""
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="on",
            # Longer than clients and proxies keep a connection, or they would use one that closes.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(grace) + _READING,
        )
        super().__init__(config)
        self._app, self._grace = app, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does after a signal."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._app.state.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
