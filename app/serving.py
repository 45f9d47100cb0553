"""Two servers in one process: the service's, and beside it the operators', which end together."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

UNREAD = 0.2
"""Seconds in which a connection that was just made brings its request: one that has none is closed after them."""


class Serving(uvicorn.Server):
    """The service's server, which runs the operators' one beside it: one signal ends both.

    Both stop to listen at once and drain at the same time, each within its `timeout_graceful_shutdown`; the lifespan,
    which closes what both work with, ends after the later of the two.
    """

    def __init__(self, config: uvicorn.Config, beside: uvicorn.Config, listener: socket.socket):
        """beside: the operators' app, with `lifespan="off"`. listener: where it is served, bound already."""
        super().__init__(config)
        self._beside, self._listener = uvicorn.Server(beside), listener
        self._running: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts both, the operators' server last."""
        await super().startup(sockets)
        if self.started and not self.should_exit:
            # _serve and not serve: signals are for the first server, which passes them on
            self._running = asyncio.create_task(self._beside._serve([self._listener]), name="newel-admin")
            end = self.lifespan.shutdown

            async def when_both_have_drained() -> None:
                if self._running:
                    await asyncio.wait({self._running})
                await end()

            self.lifespan.shutdown = when_both_have_drained

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends both; who has connected by then is answered."""
        self._beside.should_exit = True
        waiting = [one for listener in sockets or [] for one in _accepted(listener)]
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for one in waiting:
            await loop.connect_accepted_socket(self._protocol, one)
        await asyncio.sleep(UNREAD)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made

    def handle_exit(self, sig: int, frame: object) -> None:
        """Passes a second Ctrl-C on, which does not wait."""
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
        self._beside.force_exit = self.force_exit


def _accepted(listener: socket.socket) -> list[socket.socket]:
    """The connections that the kernel has made and nobody has taken yet; then it makes no more."""
    found = []
    listener.setblocking(False)
    try:
        while True:
            one, _ = listener.accept()
            one.setblocking(False)
            found.append(one)
    except BlockingIOError:
        pass
    return found
