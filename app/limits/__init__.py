"""Rates and budgets of keys, which concurrent requests cannot beat: reserve, then settle."""

from app.limits.ledger import LedgerDown
from app.limits.limits import Limits
from app.limits.opening import open_limits
from app.limits.reservation import NOTHING, Nothing, Reservation

__all__ = ["NOTHING", "LedgerDown", "Limits", "Nothing", "Reservation", "open_limits"]
