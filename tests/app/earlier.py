"""Databases as an earlier version left them."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from app.store import database as databases


async def as_it_was(url: str, revision: str) -> None:
    """Builds the empty tables of a revision."""

    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(databases.MIGRATIONS))
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)
        with EnvironmentContext(config, script, fn=lambda now, _: script._upgrade_revs(revision, now)) as run:
            run.configure(connection=connection)
            run.run_migrations()

    parsed = databases.database_url(url)
    if parsed.drivername.startswith("sqlite"):
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        await databases._write_ahead(parsed)
    engine = databases.connect(parsed)
    async with engine.begin() as connection:
        await connection.run_sync(upgrade)
    await engine.dispose()
