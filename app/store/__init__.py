"""What is kept: tenants, keys, turns with every verdict, tickets, feedback, policies, the webhook outbox, audit."""

from app.store.audit import AuditEntry
from app.store.database import migrate
from app.store.errors import Conflict, NotFound, SpillFull, StoreDown, StoreError
from app.store.spill import Replayed
from app.store.store import Store
from app.store.vault import Owner, Sealed

__all__ = [
    "AuditEntry",
    "Conflict",
    "NotFound",
    "Owner",
    "Replayed",
    "Sealed",
    "SpillFull",
    "Store",
    "StoreDown",
    "StoreError",
    "migrate",
]
