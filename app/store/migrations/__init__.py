"""Alembic revisions, run by `app.store.migrate`; one file a change, in `versions/`."""
