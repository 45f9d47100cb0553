"""How many failures an address and the start of a key have, and which address a request came from."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from app.login import Buckets, Failures, origin


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_has_its_tokens_at_once_and_then_one_in_a_while() -> None:
    clock = Clock()
    buckets = Buckets(3, 6.0, clock=clock)  # 3, and then one each 10 s
    assert [buckets.take("a") for _ in range(3)] == [0.0, 0.0, 0.0]
    assert buckets.take("a") == buckets.wait("a") == pytest.approx(10.0)
    assert buckets.take("b") == 0.0
    clock.now += 9.0
    assert buckets.take("a") == pytest.approx(1.0)
    clock.now += 1.0
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == pytest.approx(10.0)
    clock.now += 3600.0
    assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(10.0)]


def test_buckets_forget_the_one_that_failed_longest_ago() -> None:
    buckets = Buckets(1, 1.0, size=100, clock=Clock())
    buckets.take("attacker")
    for number in range(1000):
        buckets.take(f"n{number}")
        if number % 50 == 0:
            buckets.take("attacker")
    assert len(buckets) == 100
    assert buckets.wait("n999") > 0
    assert buckets.wait("n1") == 0


def test_an_address_and_the_start_of_a_key_are_limited_each_for_itself() -> None:
    failures = Failures(2, 1.0, Clock())
    assert [failures.note("1.1.1.1", "nk-aaaaa"), failures.note("1.1.1.2", "nk-aaaaa")] == [0.0, 0.0]
    assert failures.note("1.1.1.3", "nk-aaaaa") > 0  # one key guessed from many addresses
    assert not failures.limited("1.1.1.1")
    assert failures.note("1.1.1.1", "nk-bbbbb") == 0.0
    assert failures.limited("1.1.1.1")
    assert failures.note("1.1.1.1", "nk-ccccc") > 0  # many keys guessed from one address
    assert not failures.limited("") and failures.note("", "") == 0.0


PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "found"),
    [
        ("203.0.113.9", [], False, "203.0.113.9"),
        ("203.0.113.9", [b"1.2.3.4"], False, "203.0.113.9"),
        ("10.0.0.1", [b"1.2.3.4"], False, "10.0.0.1"),
        ("203.0.113.9", [b"1.2.3.4"], True, "203.0.113.9"),  # no proxy of ours
        ("10.0.0.1", [b"1.2.3.4"], True, "1.2.3.4"),
        ("10.0.0.1", [b"6.6.6.6, 1.2.3.4"], True, "1.2.3.4"),  # what a client wrote itself stands further left
        ("10.0.0.1", [b"6.6.6.6", b"1.2.3.4"], True, "1.2.3.4"),
        ("10.0.0.1", [b"6.6.6.6, 1.2.3.4 , 10.9.9.9"], True, "1.2.3.4"),
        ("10.0.0.1", [b"10.0.0.2, 10.0.0.3"], True, "10.0.0.2"),
        ("10.0.0.1", [b"1.2.3.4:5678"], True, "1.2.3.4"),
        ("10.0.0.1", [b"1.2.3.4, nonsense"], True, "10.0.0.1"),
        ("10.0.0.1", [b"1.2.3.4, \xff"], True, "10.0.0.1"),
        ("10.0.0.1", [b""], True, "10.0.0.1"),
        ("::ffff:10.0.0.1", [b"1.2.3.4"], True, "1.2.3.4"),
        ("fd00::1", [b"[2001:db8:1:2:3:4:5:6]:443"], True, "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", [], False, "2001:db8:1:2::/64"),
        ("fe80::1%eth0", [], False, "fe80::/64"),
        ("testclient", [b"1.2.3.4"], True, "testclient"),
        ("", [], True, ""),
    ],
)
def test_a_request_comes_from_where_the_last_proxy_of_ours_saw_it(
    peer: str, forwarded: list[bytes], trusted: bool, found: str
) -> None:
    assert origin(peer, forwarded, PROXIES if trusted else []) == found
