"""Failed attempts to be let in: how many an address and the start of a key have, and from where a request came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

REMEMBERED = 10_000
"""Names of each kind that are remembered; beyond, the one that failed longest ago is forgotten."""


class Buckets:
    """Token buckets by name, as the time at which each will be full again (GCRA), in bounded memory."""

    __slots__ = ("_clock", "_full_at", "_room", "_seconds", "_size")

    def __init__(
        self, burst: int, per_minute: float, size: int = REMEMBERED, clock: Callable[[], float] = time.monotonic
    ):
        self._seconds = 60.0 / per_minute
        self._room, self._size, self._clock = burst * self._seconds, size, clock
        self._full_at: dict[str, float] = {}

    def wait(self, name: str) -> float:
        """The seconds until this name has a token again; 0 while it has one."""
        return max(0.0, self._full_at.get(name, 0.0) + self._seconds - self._room - self._clock())

    def take(self, name: str) -> float:
        """Takes a token, and returns 0; without one, the seconds until there is one."""
        if wait := self.wait(name):
            return wait
        full_at = self._full_at
        full_at[name] = max(full_at.pop(name, 0.0), self._clock()) + self._seconds
        if len(full_at) > self._size:
            del full_at[next(iter(full_at))]
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at)


class Failures:
    """What is held against an address and against the start of a key, each replica for itself."""

    def __init__(self, burst: int, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._addresses, self._keys = (Buckets(burst, per_minute, clock=clock) for _ in range(2))

    def limited(self, address: str) -> bool:
        """True for an address that has failed too often just now."""
        return bool(address) and self._addresses.wait(address) > 0

    def note(self, address: str, start: str) -> float:
        """Notes a failure; seconds to wait when the address or the start of a key had too many before, else 0."""
        waits = (buckets.take(name) for buckets, name in ((self._addresses, address), (self._keys, start)) if name)
        return max([0.0, *waits])


def origin(peer: str, forwarded: Iterable[bytes], trusted: Sequence[IPv4Network | IPv6Network]) -> str:
    """The address that a request came from: an IPv4, or the /64 of an IPv6, of which one person has all.

    forwarded: the values of X-Forwarded-For. They are read from the right, and only as far as trusted proxies wrote
    them: what stands further left is what anybody may have sent.
    """
    hops = [hop.strip() for value in forwarded for hop in value.decode("latin-1").split(",")] if trusted else []
    address = _address(peer)
    while address is not None and hops and any(address in network for network in trusted):
        if (before := _address(hops.pop())) is None:
            break
        address = before
    if address is None:
        return peer
    return f"{IPv6Network((int(address) >> 64 << 64, 64))}" if isinstance(address, IPv6Address) else str(address)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address in a hop, which some proxies write with its port; None for what is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
