"""Turns that continue others, whose histories are kept once; and where a turn came from."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the columns; the history of earlier turns is whole, and stays so."""
    for name in ("parent", "release", "surface", "priority", "trace"):
        op.add_column("turns", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("turns", sa.Column("linked", sa.Boolean(), nullable=True))
    for name in ("choice", "cached_tokens"):
        op.add_column("turns", sa.Column(name, sa.Integer(), nullable=True))
