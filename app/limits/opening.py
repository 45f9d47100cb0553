"""Which ledger a gateway has, by its settings."""

from __future__ import annotations

from app.limits.ledger import Ledger
from app.limits.limits import Limits
from app.limits.memory import MemoryLedger
from app.limits.postgres import PostgresLedger
from app.metrics import Metrics
from app.settings import LimitSettings, Settings
from app.store.budgets import Budgets
from app.store.database import Database, database_url

SPARE = 60.0
"""Seconds that a request may need beside the wait for the engine."""


def open_limits(settings: Settings, database: Database, metrics: Metrics) -> Limits:
    """The limits of this replica. Raises ValueError for a ledger that the other settings do not allow."""
    lease = 2 * (settings.total_timeout + SPARE)
    ledger = _ledger(settings.limits, settings.database_url, database, lease)
    return Limits(ledger, metrics, lease, settings.limits.when_limits_fail, settings.limits.share)


def _ledger(limits: LimitSettings, url: str, database: Database, lease: float) -> Ledger:
    postgres = database_url(url).drivername.startswith("postgresql")
    automatic = "redis" if limits.redis_url else "postgresql" if postgres else "memory"
    backend = automatic if limits.backend == "auto" else limits.backend
    if backend == "memory":
        return MemoryLedger(lease, Budgets(database))
    if backend == "postgresql":
        if not postgres:
            raise ValueError('limits.backend = "postgresql" needs a PostgreSQL in `database`')
        return PostgresLedger(database, lease, limits.timeout)
    if limits.redis_url is None:
        raise ValueError('limits.backend = "redis" needs limits.redis_url, such as redis://cache.internal:6379/0')
    try:
        from app.limits.redis import RedisLedger
    except ImportError:
        raise ValueError("limits.redis_url needs the extra `redis`: pip install newel[redis]") from None
    return RedisLedger(limits.redis_url.get_secret_value(), lease, limits.timeout)
