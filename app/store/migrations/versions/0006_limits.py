"""Budgets of keys and idempotency keys.

The functions are for PostgreSQL, where one statement has to do the work of a transaction: the row of an account stays
locked for one round trip only. Their rules are in `app.limits.ledger`, their equals in `app.limits.redis`.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_GO_ON = """
CREATE FUNCTION newel_budget(
    p_account text, p_requests bigint, p_tokens bigint, p_day bigint, p_month bigint, p_lease bigint, p_at bigint
) RETURNS budgets LANGUAGE plpgsql AS $$
DECLARE
    one budgets;
    now bigint;
    passed bigint;
    today int;
    this int;
    gone record;
BEGIN
    -- what a crash of the server may lose is less than a second of use; waiting for its disk costs most of the time
    PERFORM set_config('synchronous_commit', 'off', true);
    SELECT * INTO one FROM budgets WHERE account = p_account FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO budgets VALUES (p_account, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) ON CONFLICT DO NOTHING;
        SELECT * INTO one FROM budgets WHERE account = p_account FOR UPDATE;
    END IF;
    -- after the lock: who waited for it must not be earlier than who had it
    now := CASE WHEN p_at = 0 THEN floor(extract(epoch FROM clock_timestamp()) * 1000000)::bigint ELSE p_at END;
    passed := CASE WHEN one.seen = 0 THEN 0 ELSE least(greatest(now - one.seen, 0), p_lease / 2) END;
    one.seen := now;
    one.clock := one.clock + passed;
    IF p_requests <> -1 THEN
        one.requests := greatest(0, one.requests - passed * p_requests::double precision / 60000000);
    END IF;
    IF p_tokens <> -1 THEN
        one.tokens := greatest(0, one.tokens - passed * p_tokens::double precision / 60000000);
    END IF;
    IF p_day = -1 AND p_month = -1 THEN
        RETURN one;
    END IF;
    today := now / 86400000000;
    this := extract(year FROM date '1970-01-01' + today) * 12 + extract(month FROM date '1970-01-01' + today) - 1;
    IF today > one.day THEN
        one.day_used := 0;
    END IF;
    one.day := CASE WHEN one.day - today = 1 THEN one.day ELSE today END;
    IF this > one.month THEN
        one.month_used := 0;
    END IF;
    one.month := CASE WHEN one.month - this = 1 THEN one.month ELSE this END;
    FOR gone IN DELETE FROM budget_holds WHERE account = p_account AND expires <= one.clock RETURNING tokens, nanos LOOP
        one.held_tokens := one.held_tokens - gone.tokens;
        one.held_nanos := one.held_nanos - gone.nanos;
    END LOOP;
    RETURN one;
END $$
"""

_KEEP = """
CREATE FUNCTION newel_budget_keep(one budgets) RETURNS void LANGUAGE sql AS $$
    UPDATE budgets SET seen = one.seen, clock = one.clock, requests = one.requests, tokens = one.tokens,
        day = one.day, day_used = one.day_used, month = one.month, month_used = one.month_used,
        held_tokens = one.held_tokens, held_nanos = one.held_nanos
    WHERE account = one.account
$$
"""

_RESERVE = """
CREATE FUNCTION newel_reserve(
    p_account text, p_requests bigint, p_tokens bigint, p_day bigint, p_month bigint, p_lease bigint, p_at bigint,
    p_hold text, p_hold_tokens bigint, p_hold_nanos bigint,
    OUT refused int, OUT now bigint, OUT requests double precision, OUT tokens double precision, OUT day int,
    OUT day_used bigint, OUT month int, OUT month_used bigint, OUT held_tokens bigint, OUT held_nanos bigint
) LANGUAGE plpgsql AS $$
DECLARE
    one budgets;
    slack constant double precision := 0.000001;
BEGIN
    one := newel_budget(p_account, p_requests, p_tokens, p_day, p_month, p_lease, p_at);
    refused := CASE
        WHEN p_day <> -1 AND one.day_used + one.held_tokens + p_hold_tokens > p_day THEN 1
        WHEN p_month <> -1 AND one.month_used + one.held_nanos + p_hold_nanos > p_month THEN 2
        WHEN p_requests <> -1 AND one.requests + 1 > p_requests + slack THEN 3
        WHEN p_tokens <> -1 AND one.tokens + p_hold_tokens > p_tokens + slack THEN 4
        ELSE 0 END;
    IF refused = 0 THEN
        one.requests := one.requests + CASE WHEN p_requests = -1 THEN 0 ELSE 1 END;
        one.tokens := one.tokens + CASE WHEN p_tokens = -1 THEN 0 ELSE p_hold_tokens END;
        IF p_day <> -1 OR p_month <> -1 THEN
            INSERT INTO budget_holds VALUES (p_hold, p_account, p_hold_tokens, p_hold_nanos, one.clock + p_lease);
            one.held_tokens := one.held_tokens + p_hold_tokens;
            one.held_nanos := one.held_nanos + p_hold_nanos;
        END IF;
    END IF;
    PERFORM newel_budget_keep(one);
    now := one.seen; requests := one.requests; tokens := one.tokens; day := one.day; day_used := one.day_used;
    month := one.month; month_used := one.month_used;
    held_tokens := one.held_tokens; held_nanos := one.held_nanos;
END $$
"""

_SETTLE = """
CREATE FUNCTION newel_settle(
    p_account text, p_requests bigint, p_tokens bigint, p_day bigint, p_month bigint, p_lease bigint, p_at bigint,
    p_hold text, p_hold_tokens bigint, p_hold_nanos bigint, p_used_tokens bigint, p_used_nanos bigint
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    one budgets;
BEGIN
    one := newel_budget(p_account, p_requests, p_tokens, p_day, p_month, p_lease, p_at);
    IF p_tokens <> -1 THEN
        one.tokens := greatest(0, one.tokens + p_used_tokens - p_hold_tokens);
    END IF;
    IF p_day <> -1 OR p_month <> -1 THEN
        DELETE FROM budget_holds WHERE id = p_hold;
        IF FOUND THEN
            one.held_tokens := one.held_tokens - p_hold_tokens;
            one.held_nanos := one.held_nanos - p_hold_nanos;
        END IF;
        one.day_used := one.day_used + p_used_tokens;
        one.month_used := one.month_used + p_used_nanos;
    END IF;
    PERFORM newel_budget_keep(one);
END $$
"""


def upgrade() -> None:
    """Makes the tables, and on PostgreSQL the functions."""
    op.create_table(
        "budgets",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("seen", sa.BigInteger(), nullable=False),
        sa.Column("clock", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.Double(), nullable=False),
        sa.Column("tokens", sa.Double(), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("day_used", sa.BigInteger(), nullable=False),
        sa.Column("month", sa.Integer(), nullable=False),
        sa.Column("month_used", sa.BigInteger(), nullable=False),
        sa.Column("held_tokens", sa.BigInteger(), nullable=False),
        sa.Column("held_nanos", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account", name="pk_budgets"),
    )
    op.create_table(
        "budget_holds",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("nanos", sa.BigInteger(), nullable=False),
        sa.Column("expires", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_budget_holds"),
    )
    op.create_index("ix_budget_holds_account_expires", "budget_holds", ["account", "expires"], unique=False)
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("turn", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key", "hash", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_turn", "idempotency", ["turn"], unique=False)
    op.create_index("ix_idempotency_expires_at", "idempotency", ["expires_at"], unique=False)
    if op.get_bind().dialect.name == "postgresql":
        for function in (_GO_ON, _KEEP, _RESERVE, _SETTLE):
            op.execute(sa.DDL(function))  # type: ignore[no-untyped-call]
