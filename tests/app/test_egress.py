"""Which addresses may be called, however they are spelled and whatever a name resolves to."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from app.desk import why
from app.egress import AddressRefused, Allowed, Target, is_public

NOTHING = Allowed()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("8.8.8.8", True),
        ("100.63.255.255", True),
        ("172.15.255.255", True),
        ("172.32.0.1", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False),
        ("127.255.255.254", False),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("169.254.169.254", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2001:db8::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
    ],
)
def test_an_address_is_public_or_not(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


@pytest.mark.parametrize("entry", ["", "host", "host:", ":80", "host:http", "10.0.0.1/8", "10.0.0.0/99", "a/b:80"])
def test_an_allowance_that_says_nothing_is_an_error(entry: str) -> None:
    with pytest.raises(ValueError, match="neither host:port nor a network"):
        Allowed.read([entry])


@pytest.mark.parametrize(
    ("url", "allow", "works"),
    [
        ("https://hooks.example.com/x", [], True),
        ("http://hooks.example.com/x", [], False),
        ("http://hooks.example.com/x", ["hooks.example.com:80"], True),
        ("http://HOOKS.example.com/x", ["hooks.Example.com:80"], True),
        ("http://hooks.example.com:81/x", ["hooks.example.com:80"], False),
        ("http://hooks.example.com/x", ["0.0.0.0/0"], False),
        ("http://10.1.2.3:8080/x", ["10.1.0.0/16"], True),
        ("http://10.2.2.3:8080/x", ["10.1.0.0/16"], False),
        ("http://10.1.2.3:8080/x", ["10.1.2.3:8080"], True),
        ("https://10.1.2.3/x", [], False),
        ("https://10.1.2.3/x", ["10.1.2.3:443"], True),
        ("https://[::1]:8443/x", ["[::1]:8443"], True),
        ("https://[fe80::1%25eth0]/x", [], False),
        ("gopher://hooks.example.com/x", [], False),
        ("file:///etc/passwd", [], False),
        ("https://name@hooks.example.com/x", [], False),
        ("https://", [], False),
    ],
)
def test_a_url_may_be_called_or_not(url: str, allow: list[str], works: bool) -> None:
    if works:
        assert Target.read(url, Allowed.read(allow)).url == url
    else:
        with pytest.raises((ValueError, AddressRefused)):
            Target.read(url, Allowed.read(allow))


class Names(AbstractResolver):
    """A name server that gives its answers one after the other."""

    def __init__(self, *answers: str):
        self.answers = list(answers)

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        address = self.answers.pop(0)
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)]

    async def close(self) -> None: ...


@pytest.fixture
async def inside() -> AsyncIterator[tuple[int, list[str]]]:
    """The port of a service on loopback that must not be reached, and what it was asked."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.host)
        return web.Response(text="secret")

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1], asked
    await runner.cleanup()


async def called(target: Target, url: str, *answers: str) -> str:
    """The kind of error of a call through the target's connections, or what was answered."""
    connector = target.connector()
    if answers:
        connector._resolver = Names(*answers)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            async with session.get(url, allow_redirects=False) as answer:
                return await answer.text()
        except (aiohttp.ClientError, OSError) as error:
            return why(error)


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "::1"])
async def test_a_name_that_resolves_to_an_internal_address_is_not_called(
    inside: tuple[int, list[str]], address: str
) -> None:
    target = Target("http://hooks.example.com", False, NOTHING)
    assert await called(target, f"http://hooks.example.com:{inside[0]}/", address) == "AddressRefused"
    assert inside[1] == []


async def test_a_name_that_changes_its_address_between_two_looks_gains_nothing(inside: tuple[int, list[str]]) -> None:
    """DNS rebinding: whoever resolves first to check sees a public address, the call gets loopback."""
    target = Target("http://hooks.example.com", False, NOTHING)
    target.check(ip_address("93.184.215.14"))
    assert await called(target, f"http://hooks.example.com:{inside[0]}/", "127.0.0.1") == "AddressRefused"
    assert inside[1] == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "[::ffff:7f00:1]", "localhost"]
)
async def test_no_spelling_of_an_internal_address_gets_through(inside: tuple[int, list[str]], host: str) -> None:
    told = await called(Target("http://x", False, NOTHING), f"http://{host}:{inside[0]}/")
    assert told in ("AddressRefused", "InvalidUrlClientError")
    assert inside[1] == []


async def test_what_the_operator_allows_is_called(inside: tuple[int, list[str]]) -> None:
    port = inside[0]
    url = f"http://hooks.internal:{port}/"
    named = Target.read(url, Allowed.read([f"hooks.internal:{port}"]))
    assert await called(named, url, "127.0.0.1") == "secret"
    networked = Target.read(f"http://127.0.0.1:{port}/", Allowed.read(["127.0.0.0/8"]))
    assert await called(networked, f"http://127.0.0.1:{port}/") == "secret"
    assert await called(networked, url, "10.0.0.1") == "AddressRefused"
