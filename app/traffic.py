"""What a request may use: its key's caps, budgets and priority, a release, a place before the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.admission import Slot
from app.errors import ApiError
from app.fleet import Fleet, Release
from app.limits import NOTHING, Limits, Nothing, Reservation
from app.records import Key, Tenant, Turn
from app.schemas import ChatRequest

BYTES_A_TOKEN, TOKENS_A_MESSAGE = 3, 8
"""A prompt has no more tokens than so, in any language that a tokenizer was made for."""


@dataclass(frozen=True, slots=True)
class Permit:
    """What one request may use: `async with permit.slot` is its turn before the engines of `release`."""

    release: Release
    reservation: Reservation | Nothing
    slot: Slot

    @property
    def headers(self) -> Mapping[str, str]:
        """What the client is told of its limits."""
        return self.reservation.headers


@dataclass(slots=True)
class Counted:
    """A request that counts: what its client is told of its limits, and how many tokens it has used."""

    headers: Mapping[str, str]
    tokens: int = 0


class Traffic:
    """Lets requests in. total: seconds that a request may take, max_tokens: of a reply that names no limit."""

    def __init__(self, fleet: Fleet, limits: Limits, total: float, max_tokens: int):
        self._fleet, self._limits, self._total, self._max_tokens = fleet, limits, total, max_tokens
        self._clock = asyncio.get_running_loop().time

    async def admit(self, key: Key, tenant: Tenant, asked: ChatRequest, turn: Turn) -> Permit:
        """The permit of a request, to be settled however it ends.

        Raises ApiError: 400 beyond the caps of its key, 404 for a model that is not served, 429 when a rate or a budget
        is used up, 503 when no engine answers.
        """
        cap(key, asked)
        release = self._fleet.choose(asked.model, turn.conversation or turn.subject or asked.beginning)
        self._fleet.require(release)
        turn.release = release.name
        turn.priority = key.limits.priority or "interactive"
        reservation: Reservation | Nothing = NOTHING
        if self._limits.needed(key):
            prompt, reply = self._most(asked)
            reservation = await self._limits.reserve(key, prompt + reply, release.cost(prompt, reply))
        deadline = self._clock() + self._total
        return Permit(release, reservation, self._fleet.slot(release, turn.priority, deadline, tenant.name))

    @asynccontextmanager
    async def counted(self, key: Key, texts: Sequence[str], release: Release | None = None) -> AsyncIterator[Counted]:
        """Counts a request that is no chat against the limits of its key; without a release only as a request.

        What it may use at most is held meanwhile, what it has used is `tokens`, of a request that fails none. Raises
        ApiError 429.
        """
        most = sum(_tokens(text) for text in texts) if release else 0
        price = release.cost if release else _free
        reservation = await self._limits.reserve(key, most, price(most, 0))
        counted = Counted(reservation.headers)
        try:
            yield counted
        finally:
            self._limits.settle(reservation, counted.tokens, 0, price(counted.tokens, 0))

    def settle(self, permit: Permit, turns: Sequence[Turn]) -> None:
        """Counts what the request has used, in the place of what was reserved for it."""
        if permit.reservation is not NOTHING:
            prompt, reply = turns[0].prompt_tokens, sum(turn.completion_tokens for turn in turns)
            self._limits.settle(permit.reservation, prompt, reply, permit.release.cost(prompt, reply))

    def _most(self, asked: ChatRequest) -> tuple[int, int]:
        """(prompt, reply) tokens that the request can use."""
        size = sum(len(one.content.encode("utf-8", "surrogatepass")) for one in asked.conversation())
        prompt = size // BYTES_A_TOKEN + TOKENS_A_MESSAGE * len(asked.messages)
        return prompt, asked.replies * (asked.limit or self._max_tokens)


def _tokens(text: str) -> int:
    """The most tokens that a text has."""
    return len(text.encode("utf-8", "surrogatepass")) // BYTES_A_TOKEN + TOKENS_A_MESSAGE


def _free(prompt: int, reply: int) -> float:
    return 0.0


def cap(key: Key, asked: ChatRequest) -> None:
    """Holds a request to the caps of its key; raises ApiError 400 where it asks for more."""
    limits = key.limits
    for name, wanted, most in (
        ("n", asked.n, limits.max_n),
        ("max_tokens", asked.limit, limits.max_tokens),
        ("top_logprobs", asked.top_logprobs, limits.max_logprobs),
    ):
        if wanted is not None and most is not None and wanted > most:
            message = f"Invalid value for '{name}': this key may ask for {most} at most."
            raise ApiError(400, message, code="invalid_value", param=name)
    if asked.limit is None and limits.max_tokens is not None:
        asked.max_tokens = limits.max_tokens
