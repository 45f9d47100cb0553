"""A store on each database: SQLite in a file, and a real PostgreSQL started for the session."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from secrets import token_hex

import pytest

from app.records import Tenant
from app.store import Store
from tests.postgres import Cluster, programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL; without its programs tests are skipped, and in CI they fail."""
    if (found := programs()) is None:
        reason = "no PostgreSQL programs on this machine (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(found)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of an empty database, one a test module and kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('sqlite')}/newel.db"
    return request.getfixturevalue("cluster").create_database(f"newel_{token_hex(4)}")


@pytest.fixture
async def store(url: str, tmp_path: Path) -> AsyncIterator[Store]:
    """An open store with an empty spill."""
    store = await Store.open(url, tmp_path / "spill")
    yield store
    await store.close()


@pytest.fixture
async def tenant(store: Store) -> str:
    """The name of a tenant that no other test has."""
    name = f"tenant-{token_hex(4)}"
    await store.put_tenant(Tenant(name, policy="hr", when_store_fails="answer"))
    return name
