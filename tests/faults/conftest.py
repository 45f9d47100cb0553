"""Gateways in processes of their own, a database server, and the page that the faults' rows go to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.faults.engine import Engine
from tests.faults.newel import Newel
from tests.faults.page import Fault, Page
from tests.postgres import Cluster, programs

PAGE = "NEWEL_FAULTS_PAGE"
"""The variable that names the file into which the table goes."""
page_key = pytest.StashKey[Page]()
result_key = pytest.StashKey[bool]()


def needed(reason: str) -> None:
    """Skips the test; in CI it fails, since there everything is to be tried."""
    pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[page_key] = Page()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" or not report.passed:
        item.stash[result_key] = report.passed
        if not report.passed and (path := Path(report.location[0])).parent.name == "faults":
            item.config.stash[page_key].missing.append((f"{path.name}: {item.name}", report.outcome))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if where := os.environ.get(PAGE):
        Path(where).write_text(session.config.stash[page_key].text(), encoding="utf-8")


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Fault]:
    """The row of this test, which goes to the page when the test has passed."""
    row = Fault()
    yield row
    if request.node.stash.get(result_key, False):
        request.config.stash[page_key].add(row)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A scripted engine."""
    with Engine() as engine:
        yield engine


Started = Callable[..., Awaitable[Newel]]


@pytest.fixture
async def started(tmp_path: Path, engine: Engine) -> AsyncIterator[Started]:
    """Makes gateways that serve, before the scripted engine unless told otherwise."""
    made: list[Newel] = []

    async def start(**chosen: Any) -> Newel:
        home = chosen.pop("home", None) or tmp_path / f"gateway-{len(made)}"
        home.mkdir(exist_ok=True)
        gateway = Newel(home, chosen.pop("engine", engine.url), **chosen)
        made.append(gateway)
        await gateway.prepared()
        gateway.start()
        await gateway.ready()
        return gateway

    yield start
    for gateway in made:
        gateway.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without limits of its own; every connection is used once."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL."""
    found = programs()
    if found is None:
        needed("no PostgreSQL programs on this machine (Debian: apt-get install postgresql)")
        raise AssertionError
    cluster = Cluster(found)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()
