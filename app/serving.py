"""Two servers in one process: the service's, and beside it the operators', which end together."""

from __future__ import annotations

import asyncio
import socket

import uvicorn


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
        """Ends both."""
        self._beside.should_exit = True
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Passes a second Ctrl-C on, which does not wait."""
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
        self._beside.force_exit = self.force_exit
