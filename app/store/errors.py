"""What can go wrong in the store; messages name ids and causes, never what people wrote.

StoreError          the database turned a value down (too long, wrong type): a fault of ours, tell us
├── StoreDown       it cannot be reached or written (refused, full disk, locked too long): refuse the request, or spill
├── SpillFull       the spill file cannot be written either: refuse the request
├── NotFound        no such tenant, key, turn, ticket, delivery or policy version: correct the name
└── Conflict        somebody was first, or the same idempotency key came with another body: read again, then decide
"""

from __future__ import annotations


class StoreError(Exception):
    """Something that the store could not do."""


class StoreDown(StoreError):
    """The database cannot be reached or written now."""


class SpillFull(StoreError):
    """The spill file cannot take another turn."""


class NotFound(StoreError):
    """What was named is not there, or belongs to another tenant."""


class Conflict(StoreError):
    """What was asked for contradicts what is stored."""
