"""A client's connection: uvicorn's own, with bounded headers; half-closed clients are told from those that are gone."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 65_536
"""Bytes of a request's line and headers."""
PROBE_AGAIN = 0.1
"""Seconds: longer than a reset takes to come back on most networks."""
_TOO_LARGE = (
    b'{"error":{"message":"The headers are larger than 65536 bytes; send less.","type":"invalid_request_error",'
    b'"param":null,"code":"headers_too_large"}}'
)
_ANSWER = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TOO_LARGE), _TOO_LARGE)
)


class Connection(HttpToolsProtocol):
    """One connection."""

    _head = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        """Reads on, unless the headers have no end."""
        self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > MAX_HEAD:
            self._refuse()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head, self._in_head = 0, True

    def on_headers_complete(self) -> None:
        """Starts the application, unless the headers are too large."""
        self._in_head, self._head = False, 0
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEAD:
            return self._refuse()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request ends."""
        if self.cycle is not None:
            super().on_message_complete()
        self._in_head = True

    def on_body(self, body: bytes) -> None:
        """Keeps a piece of a body."""
        if self.cycle is not None:
            super().on_body(body)

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_ANSWER)
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """True when the client may still listen: it has sent all of its request, and is not answered yet.

        Something harmless is written, twice: if the client is gone, and has not only said its last word, its machine
        answers the first with a reset, the second fails, and the request is cancelled.
        """
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)
        if cycle is None or cycle.response_complete or cycle.more_body or self.pipeline:
            return False
        cycle.keep_alive = False
        self._probe(cycle)
        self.loop.call_later(PROBE_AGAIN, self._probe, cycle)
        return True

    def _probe(self, cycle: RequestResponseCycle) -> None:
        if self.transport.is_closing() or cycle.response_complete:
            return
        if not cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif cycle.chunked_encoding:
            self.transport.write(b"3\r\n:\n\n\r\n")
