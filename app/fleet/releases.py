"""Which release of a model answers a conversation: the stable one, or the canary for a share that stays the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from app.settings import SUPERVISED, ModelSettings, ShareSettings

Kind = Literal["stable", "canary", "shadow", "fallback"]


@dataclass(frozen=True, slots=True)
class Release:
    """What a request is asked of: a model as the engines of a pool know it.

    public: the model that the client asked for, whose prices (per million tokens) hold whichever release answers.
    model: "" is what the supervised engine serves.
    """

    public: str
    kind: Kind
    pool: str
    model: str
    prompt_price: float = 0.0
    completion_price: float = 0.0

    @property
    def name(self) -> str:
        """`POOL/MODEL`: what a turn notes as its release."""
        return f"{self.pool}/{self.model}" if self.model else self.pool

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What a turn costs, in the currency of the prices."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


@dataclass(frozen=True, slots=True)
class Line:
    """The releases of one public model."""

    stable: Release
    canary: Release | None = None
    canary_share: float = 0.0
    shadow: Release | None = None
    shadow_share: float = 0.0
    way: tuple[Release, ...] = ()
    """The stable release and what it falls back to, in this order."""

    @property
    def all(self) -> Iterator[Release]:
        """Each release that may be asked."""
        return (one for one in (*self.way, self.canary, self.shadow) if one is not None)

    def choose(self, sticky: str) -> Release:
        """The canary for its share of the values of `sticky`, always the same ones; by chance where it is empty."""
        return self.canary if self.canary and falls(self.canary, self.canary_share, sticky) else self.stable

    def shadowed(self, sticky: str) -> Release | None:
        """The release that is asked the same in the background."""
        return self.shadow if self.shadow and falls(self.shadow, self.shadow_share, sticky) else None


def falls(release: Release, share: float, sticky: str) -> bool:
    """True for a share of all conversations: a larger share is the smaller one's conversations and some more.

    Another release has others, so that it is not always the same people on whom things are tried.
    """
    if not sticky:
        return random.random() < share  # noqa: S311 (no secret)
    told = f"{release.kind}\0{release.public}\0{release.name}\0{sticky}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(told, digest_size=8).digest()) < share * 2.0**64


def lines(models: Mapping[str, ModelSettings]) -> dict[str, Line]:
    """The releases of every public model."""
    return {name: _line(name, models) for name in models}


def single(model: str) -> dict[str, Line]:
    """The one model of the supervised engine."""
    stable = Release(model, "stable", SUPERVISED, model)
    return {model: Line(stable, way=(stable,))}


def _line(public: str, models: Mapping[str, ModelSettings]) -> Line:
    own = models[public]

    def release(kind: Kind, pool: str, model: str) -> Release:
        return Release(public, kind, pool, model, own.prompt_price, own.completion_price)

    def second(kind: Kind, settings: ShareSettings) -> Release | None:
        return release(kind, settings.pool or own.pool, settings.model) if settings.share else None

    def fallback(name: str) -> Release:
        """A model where there is one of this name, else the same model on another pool."""
        other = models.get(name)
        if other:
            return release("fallback", other.pool, other.model)
        return release("fallback", name, "" if name == SUPERVISED else own.model)

    stable = release("stable", own.pool, own.model)
    return Line(
        stable,
        second("canary", own.canary),
        own.canary.share,
        second("shadow", own.shadow),
        own.shadow.share,
        (stable, *(fallback(name) for name in own.fallback)),
    )
