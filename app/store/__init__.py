"""What is kept: tenants, keys, turns with every verdict, tickets, feedback, policies, the webhook outbox, audit."""

from app.store.audit import Audited, AuditEntry, Break
from app.store.chain import Head, read_head
from app.store.database import migrate
from app.store.errors import Conflict, NotFound, SpillFull, StoreDown, StoreError
from app.store.exports import Cleaned
from app.store.privacy import Erased
from app.store.spill import Replayed
from app.store.store import Store
from app.store.vault import Owner, Sealed

__all__ = [
    "AuditEntry",
    "Audited",
    "Break",
    "Cleaned",
    "Conflict",
    "Erased",
    "Head",
    "NotFound",
    "Owner",
    "Replayed",
    "Sealed",
    "SpillFull",
    "Store",
    "StoreDown",
    "StoreError",
    "migrate",
    "read_head",
]
