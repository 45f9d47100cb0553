"""The tables, in SQLAlchemy Core; `migrations/` builds exactly these (a test compares the two)."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeDecorator


def storable(value: str) -> str:
    """`value` as both databases can hold it: NUL and lone surrogates, legal in JSON, become U+FFFD."""
    if value.isascii() and "\x00" not in value:
        return value
    return value.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Plain(TypeDecorator[str]):
    """Text that any client may have sent."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text without what PostgreSQL or UTF-8 cannot hold."""
        return None if value is None else storable(value)


class Moment(TypeDecorator[datetime]):
    """A point in time: aware and in UTC on both sides, though SQLite keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time in UTC; a naive one is a mistake."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"the time {value} has no zone; use app.records.now()")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time, aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str, *, key: bool = False, null: bool = False) -> Column[str]:
    return Column(name, Plain, primary_key=key, nullable=null)


def _time(name: str, *, null: bool = False) -> Column[datetime]:
    return Column(name, Moment, nullable=null)


tenants = Table(
    "tenants",
    metadata,
    _text("name", key=True),
    _text("policy"),
    _text("when_store_fails"),
    _time("created_at"),
)

keys = Table(
    "keys",
    metadata,
    _text("id", key=True),
    Column("tenant", Plain, ForeignKey("tenants.name"), nullable=False),
    _text("scope"),
    Column("sha256", Plain, nullable=False, unique=True),
    _text("hint"),
    _text("note"),
    _time("created_at"),
    _time("revoked_at", null=True),
    Column("limits", JSON, nullable=True),
)

conversations = Table(
    "conversations",
    metadata,
    Column("tenant", Plain, ForeignKey("tenants.name"), primary_key=True),
    _text("id", key=True),
    _text("subject"),
    _time("created_at"),
    _time("last_at"),
)

turns = Table(
    "turns",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    _text("conversation"),
    _text("key"),
    _text("policy"),
    _text("model"),
    _text("request_id"),
    Column("streamed", Boolean, nullable=False),
    _text("subject"),
    Column("history", JSON, nullable=False),
    _text("asked"),
    _text("said"),
    _text("reasoning", null=True),
    Column("calls", JSON, nullable=True),
    _text("input_action", null=True),
    _text("input_rule", null=True),
    _text("input_route", null=True),
    _text("output_action", null=True),
    _text("output_rule", null=True),
    _text("output_route", null=True),
    _text("action"),
    _text("rule"),
    _text("finish_reason"),
    _text("error"),
    _text("ticket", null=True),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("first_token_ms", Float, nullable=True),
    Column("total_ms", Float, nullable=True),
    _text("head_hash"),
    _text("tail_hash"),
    _text("retry_of"),
    _text("parent", null=True),
    Column("linked", Boolean, nullable=True),
    _text("release", null=True),
    _text("surface", null=True),
    _text("priority", null=True),
    _text("trace", null=True),
    Column("choice", Integer, nullable=True),
    Column("cached_tokens", Integer, nullable=True),
    Column("guard_input_ms", Float, nullable=True),
    Column("guard_output_ms", Float, nullable=True),
    _time("created_at"),
    _time("finished_at", null=True),
    ForeignKeyConstraint(["tenant", "conversation"], ["conversations.tenant", "conversations.id"]),
    Index(None, "tenant", "conversation", "created_at"),
    Index(None, "tenant", "tail_hash", "created_at"),
)
"""`history` is what the parent's record does not hold (`app.store.history`). linked: true, it needs the parent; false,
something was taken out of it, and no other history may point into this turn."""
Index(None, turns.c.created_at)
Index(None, turns.c.tenant, turns.c.subject)
_OPEN = text("finished_at IS NULL")
Index("ix_turns_open", turns.c.created_at, sqlite_where=_OPEN, postgresql_where=_OPEN)

verdicts = Table(
    "verdicts",
    metadata,
    Column("turn", Plain, ForeignKey("turns.id"), primary_key=True),
    _text("stage", key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    _text("rule"),
    _text("action"),
    _text("mode"),
    _text("broken"),
    Column("message", Integer, nullable=False),
    Column("findings", JSON, nullable=False),
    Index(None, "rule"),
)

withheld = Table(
    "withheld",
    metadata,
    Column("turn", Plain, ForeignKey("turns.id"), primary_key=True),
    _text("kind", key=True),
    _text("text"),
)

feedback = Table(
    "feedback",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    Column("turn", Plain, ForeignKey("turns.id"), nullable=False, index=True),
    _text("kind"),
    Column("value", Float, nullable=True),
    _text("text"),
    _text("other"),
    _text("choice"),
    _text("source"),
    _text("idempotency_key", null=True),
    Column("current", Boolean, nullable=False),
    _time("created_at"),
    Index(None, "tenant", "idempotency_key", "kind", unique=True),
    Index(None, "created_at"),
)
_CURRENT = text("current")
Index(
    "uq_feedback_current",
    feedback.c.tenant,
    feedback.c.turn,
    feedback.c.kind,
    feedback.c.other,
    feedback.c.source,
    unique=True,
    sqlite_where=_CURRENT,
    postgresql_where=_CURRENT,
)

tickets = Table(
    "tickets",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    _text("conversation"),
    Column("turn", Plain, ForeignKey("turns.id"), nullable=False, index=True),
    _text("queue"),
    _text("priority"),
    _time("due_at"),
    _text("rule"),
    _text("state"),
    _text("answer"),
    _text("answered_by"),
    _time("answered_at", null=True),
    _text("closed_by"),
    _time("closed_at", null=True),
    _time("delivered_at", null=True),
    _text("delivered_in"),
    _time("created_at"),
    Index(None, "tenant", "conversation"),
    Index(None, "state", "due_at"),
)

deliveries = Table(
    "deliveries",
    metadata,
    _text("id", key=True),
    Column("ticket", Plain, ForeignKey("tickets.id"), nullable=False),
    _text("kind"),
    Column("body", JSON, nullable=False),
    _text("state"),
    Column("attempts", Integer, nullable=False),
    _text("error"),
    _time("next_at"),
    _time("leased_until", null=True),
    _time("created_at"),
    _time("sent_at", null=True),
    Index(None, "state", "next_at"),
)

vault = Table(
    "vault",
    metadata,
    _text("tenant", key=True),
    _text("conversation", key=True),
    _text("owner", key=True),
    _text("placeholder", key=True),
    _text("key"),
    Column("data", LargeBinary, nullable=False),
    _time("expires_at"),
    Index(None, "expires_at"),
)

policies = Table(
    "policies",
    metadata,
    _text("name", key=True),
    _text("version", key=True),
    _text("source"),
    Column("active", Boolean, nullable=False),
    _time("created_at"),
    _text("created_by"),
)
_ACTIVE = text("active")
Index("uq_policies_active", policies.c.name, unique=True, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    _time("at"),
    _text("actor"),
    _text("action"),
    _text("subject"),
    Column("detail", JSON, nullable=False),
    _text("previous"),
    _text("hash"),
)
"""A chain: `id` counts without a gap, so that it cannot fork, and `previous` is the hash of the entry before."""

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("entries", BigInteger, nullable=False),
    _text("hash"),
    _text("key"),
    _text("mac"),
)
"""One row: how many entries there are, the last one's hash, and an HMAC of both by which a cut tail is found."""

erasures = Table(
    "erasures",
    metadata,
    _text("id", key=True),
    _text("tenant"),
    _text("subject"),
    _text("conversation"),
    _time("at"),
    _time("done_at", null=True),
    Index(None, "at"),
)
"""What was erased: turns of this person or conversation that began before `at` are not written any more."""

exports = Table(
    "exports",
    metadata,
    _text("host", key=True),
    _text("folder", key=True),
    _text("tenant"),
    _text("by"),
    _time("at"),
)
"""A folder that `newel export` wrote, on which machine."""

exported = Table(
    "exported",
    metadata,
    _text("host", key=True),
    _text("folder", key=True),
    _text("turn", key=True),
    _text("origin", key=True),
    _text("tenant"),
    _text("conversation"),
    _text("subject"),
    _time("began"),
    ForeignKeyConstraint(["host", "folder"], ["exports.host", "exports.folder"]),
    Index(None, "tenant", "subject"),
    Index(None, "tenant", "conversation"),
)
"""Lines of the turn `turn` in an export hold words of the turn `origin`, whose person and conversation these are."""

pulse = Table("pulse", metadata, Column("id", Integer, primary_key=True, autoincrement=False), _time("at"))
"""One row that `Store.ping` writes."""

budgets = Table(
    "budgets",
    metadata,
    _text("account", key=True),
    Column("seen", BigInteger, nullable=False),
    Column("clock", BigInteger, nullable=False),
    Column("requests", Double, nullable=False),
    Column("tokens", Double, nullable=False),
    Column("day", Integer, nullable=False),
    Column("day_used", BigInteger, nullable=False),
    Column("month", Integer, nullable=False),
    Column("month_used", BigInteger, nullable=False),
    Column("held_tokens", BigInteger, nullable=False),
    Column("held_nanos", BigInteger, nullable=False),
)
"""What a key has used of its limits, and holds of them: see `app.limits.ledger`."""

budget_holds = Table(
    "budget_holds",
    metadata,
    _text("id", key=True),
    _text("account"),
    Column("tokens", BigInteger, nullable=False),
    Column("nanos", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Index(None, "account", "expires"),
)
"""What a request in flight may use at most; `expires` is by the clock of its account."""

idempotency = Table(
    "idempotency",
    metadata,
    _text("tenant", key=True),
    _text("key", key=True),
    _text("hash", key=True),
    _text("body"),
    Column("turn", Plain, nullable=True, index=True),
    _text("state"),
    _text("owner"),
    _time("leased_until"),
    _time("expires_at"),
    Index(None, "expires_at"),
)
"""An idempotency key of an API key, as a hash: the HMAC of the body it came with, and the turn that answered it."""
