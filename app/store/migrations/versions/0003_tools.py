"""Reasoning and tool calls of a turn."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the columns; earlier turns had neither."""
    op.add_column("turns", sa.Column("reasoning", sa.Text(), nullable=True))
    op.add_column("turns", sa.Column("calls", sa.JSON(), nullable=True))
