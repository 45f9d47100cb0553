"""Which addresses the gateway may call at an outsider's word: public ones, and those that the operator allows."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
from yarl import URL

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
INTERNAL: tuple[Network, ...] = (
    *map(IPv4Network, ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16", "169.254.0.0/16")),
    *map(IPv4Network, ("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16")),
    *map(IPv4Network, ("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3")),
    *map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")),
)
"""What is not on the public internet (IANA's special-purpose registries), and a cloud's host that answers on a public
address (Azure, 168.63.129.16). Of IPv6 only 2000::/3 is public at all; 6to4 and Teredo, which hide an IPv4, are not."""
NAT64, PUBLIC6 = IPv6Network("64:ff9b::/96"), IPv6Network("2000::/3")


class AddressRefused(OSError):
    """An internal address that the operator did not allow."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be called although it is internal, or speaks plain http; hosts as a URL names them, with the port."""

    hosts: frozenset[tuple[str, int]] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def read(cls, entries: Sequence[str]) -> Allowed:
        """From the settings' `host:port` and CIDR entries; raises ValueError with the entry that is neither."""
        hosts: set[tuple[str, int]] = set()
        networks: list[Network] = []
        for entry in entries:
            try:
                networks.append(ip_network(entry))
            except ValueError:
                host, _, port = entry.rpartition(":")
                if not host or not port.isdecimal() or "/" in entry:
                    raise ValueError(f"{entry!r} is neither host:port nor a network such as 10.1.0.0/16") from None
                hosts.add((host.strip("[]").lower(), int(port)))
        return cls(frozenset(hosts), tuple(networks))

    def has(self, address: Address) -> bool:
        """True for an address in one of the networks."""
        return any(address in network for network in self.networks)


def is_public(address: Address) -> bool:
    """True for a unicast address on the public internet, also behind IPv4-mapped IPv6 and NAT64."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None or address in NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in PUBLIC6:
            return False
    return not any(address in network for network in INTERNAL)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be called; free: the operator named its host and port, so that its address is not checked."""

    url: str
    free: bool
    allowed: Allowed

    @classmethod
    def read(cls, url: str, allowed: Allowed) -> Target:
        """Raises ValueError for what is no http(s) URL, plain http that is not allowed, and an internal address."""
        parts = URL(url)  # as the client reads it
        if parts.scheme not in ("http", "https") or not parts.raw_host or not parts.port:
            raise ValueError("it must be an http or https address")
        if parts.raw_user is not None or parts.raw_password is not None:
            raise ValueError("it must not carry a name and a password")
        free, literal = (parts.raw_host, parts.port) in allowed.hosts, _literal(parts.raw_host)
        if parts.scheme == "http" and not (free or (literal is not None and allowed.has(literal))):
            raise ValueError(f"it must be https, or '{parts.raw_host}:{parts.port}' must be allowed")
        target = cls(url, free, allowed)
        if literal is not None:
            target.check(literal)
        return target

    def check(self, address: Address) -> None:
        """Raises AddressRefused for an address that must not be called."""
        if not (self.free or is_public(address) or self.allowed.has(address)):
            raise AddressRefused(f"{address} is not a public address, and is not allowed")

    def connector(self) -> aiohttp.TCPConnector:
        """Connections that are checked when the socket is made: what a name resolved to before does not count, so that
        a name that changes its address between a check and the call (DNS rebinding) gains nothing."""

        def checked(info: tuple[Any, ...]) -> socket.socket:
            family, kind, protocol, _, place = info
            self.check(ip_address(place[0].partition("%")[0]))
            return socket.socket(family=family, type=kind, proto=protocol)

        return aiohttp.TCPConnector(socket_factory=checked)


def _literal(host: str) -> Address | None:
    """The address that a host is, in the one spelling of it; None for a name.

    The old spellings (0x7f.1, 2130706433, 0177.0.0.1) are names here: what they resolve to is checked as any name's is.
    """
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None
