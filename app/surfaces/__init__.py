"""The APIs that chat clients speak, each a way to read one request and to write one reply; all go through one exchange.

chat          POST /v1/chat/completions (OpenAI)
completions   POST /v1/completions (OpenAI's older API)
responses     POST /v1/responses (OpenAI)
messages      POST /v1/messages (Anthropic)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from app.errors import ApiError
from app.exchange import Exchange
from app.records import Key
from app.schemas import ChatRequest
from app.telling import Said


class Frames(Protocol):
    """One streamed reply as it is written: each method returns the bytes that are sent now."""

    def begin(self) -> bytes:
        """What comes first, once the engine has said its first word or a rule has stopped the question."""
        ...

    def piece(self, said: Said) -> bytes:
        """One piece of the reply."""
        ...

    def end(self) -> bytes:
        """The end of a reply that is complete, with its terminal event."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """The end of a reply that broke off: an error event, and the terminal event."""
        ...


class Surface(Protocol):
    """One API: pure functions between bytes and what the exchange works with."""

    name: str

    def read(self, body: bytes, key: Key, headers: Mapping[bytes, bytes]) -> ChatRequest:
        """The request as a chat request; raises ApiError 400."""
        ...

    def whole(self, exchange: Exchange, told: Sequence[Said]) -> bytes:
        """A whole reply in JSON."""
        ...

    def frames(self, exchange: Exchange) -> Frames:
        """The writer of a streamed reply."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The body of an answer with an error status, in JSON."""
        ...
