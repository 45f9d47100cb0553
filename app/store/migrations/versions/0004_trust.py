"""Trust: the audit log as a chain, limits of keys, what was erased and what was exported."""

import sqlalchemy as sa
from alembic import context, op

from app.store import chain

revision = "0004"
down_revision = "0003"
_AUDIT = sa.table(
    "audit",
    sa.column("id", sa.BigInteger()),
    sa.column("at", sa.DateTime(timezone=True)),
    *(sa.column(name, sa.Text()) for name in ("actor", "action", "subject", "previous", "hash")),
    sa.column("detail", sa.JSON()),
)
_HEAD = sa.table(
    "audit_head",
    sa.column("id", sa.Integer()),
    sa.column("entries", sa.BigInteger()),
    *(sa.column(name, sa.Text()) for name in ("hash", "key", "mac")),
)


def upgrade() -> None:
    """Makes the tables and chains the entries that are there."""
    op.add_column("keys", sa.Column("limits", sa.JSON(), nullable=True))
    with op.batch_alter_table("audit") as audit:
        audit.add_column(sa.Column("previous", sa.Text(), nullable=True))
        audit.add_column(sa.Column("hash", sa.Text(), nullable=True))
    head = _chained()
    with op.batch_alter_table("audit") as audit:
        audit.alter_column("previous", existing_type=sa.Text(), nullable=False)
        audit.alter_column("hash", existing_type=sa.Text(), nullable=False)
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("entries", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("hash", "key", "mac")),
        sa.PrimaryKeyConstraint("id", name="pk_audit_head"),
    )
    seals = context.config.attributes.get("seals")
    key, mac = seals.signed(head.value) if seals else ("", "")
    row = {"id": 1, "entries": head.entries, "hash": head.hash, "key": key, "mac": mac}
    op.bulk_insert(_HEAD, [row])
    _erasures()
    _exports()


def _chained() -> chain.Head:
    """The head of the chain that the entries form from now on, numbered without a gap."""
    connection, head = op.get_bind(), chain.EMPTY
    for row in connection.execute(sa.select(_AUDIT).order_by(_AUDIT.c.id)).mappings().all():
        after = chain.link(head, row["at"], row["actor"], row["action"], row["subject"], row["detail"])
        values = {"id": after.entries, "previous": head.hash, "hash": after.hash}
        connection.execute(sa.update(_AUDIT).where(_AUDIT.c.id == row["id"]).values(values))
        head = after
    return head


def _erasures() -> None:
    op.create_table(
        "erasures",
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("id", "tenant", "subject", "conversation")),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
    )
    op.create_index("ix_erasures_at", "erasures", ["at"])
    op.create_index("ix_turns_created_at", "turns", ["created_at"])
    op.create_index("ix_turns_tenant_subject", "turns", ["tenant", "subject"])


def _exports() -> None:
    op.create_table(
        "exports",
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("host", "folder", "tenant", "by")),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("host", "folder", name="pk_exports"),
    )
    names = ("host", "folder", "turn", "origin", "tenant", "conversation", "subject")
    op.create_table(
        "exported",
        *(sa.Column(name, sa.Text(), nullable=False) for name in names),
        sa.Column("began", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("host", "folder", "turn", "origin", name="pk_exported"),
        sa.ForeignKeyConstraint(["host", "folder"], ["exports.host", "exports.folder"], name="fk_exported_host_folder"),
    )
    op.create_index("ix_exported_tenant_subject", "exported", ["tenant", "subject"])
    op.create_index("ix_exported_tenant_conversation", "exported", ["tenant", "conversation"])
