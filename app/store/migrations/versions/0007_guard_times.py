"""How long each side of a turn was judged."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds the columns; of earlier turns nobody knows."""
    for name in ("guard_input_ms", "guard_output_ms"):
        op.add_column("turns", sa.Column(name, sa.Float(), nullable=True))
