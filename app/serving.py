"""Two servers in one process: the service's, and beside it the operators', which end together."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import uvicorn

from app.logs import event

UNREAD = 0.2
"""Seconds in which a connection that was just made brings its request: one that has none is closed after them."""
AT_ONCE = 64
"""Connections that are taken in one turn of the event loop: those that are served have their turn after them."""
SPENT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
AGAIN = 1.0
"""Seconds until connections are taken again after the system had no room for one."""


class Doorway(uvicorn.Server):
    """A server that takes connections as they come, many in one turn of the event loop.

    libuv, and so uvloop, takes one a turn. A turn in which 500 streams say something lasts 30 ms: of 500 clients that
    came together, the last would wait 15 s to be heard.
    """

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._entering: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to serve what connects to the sockets, which listen already."""
        await super().startup([])  # no server of the event loop's
        if self.started and not self.should_exit:
            for listener in sockets or []:
                listener.setblocking(False)
                self._open(listener)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends; who has connected by then is answered."""
        for listener in sockets or []:
            asyncio.get_running_loop().remove_reader(listener)
            for one in _waiting(listener):
                await self._enter(one)
            listener.close()
        if self._entering:
            await asyncio.wait(self._entering)
        await asyncio.sleep(UNREAD)
        await super().shutdown([])

    def _open(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:  # not closed meanwhile
            asyncio.get_running_loop().add_reader(listener, self._take, listener)

    def _take(self, listener: socket.socket) -> None:
        """Takes those who wait."""
        loop = asyncio.get_running_loop()
        try:
            for one in islice(_waiting(listener), AT_ONCE):
                task = loop.create_task(self._enter(one))
                self._entering.add(task)
                task.add_done_callback(self._entering.discard)
        except OSError as error:
            if error.errno not in SPENT:
                raise
            event("connections_spent", logging.ERROR, reason=str(error))
            loop.remove_reader(listener)
            loop.call_later(AGAIN, self._open, listener)

    async def _enter(self, one: socket.socket) -> None:
        with suppress(OSError):  # it is gone already
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, one)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made


class Serving(Doorway):
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


def _waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that the kernel has made and nobody has taken yet; raises OSError."""
    while True:
        try:
            one, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        one.setblocking(False)
        yield one
