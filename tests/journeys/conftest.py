"""The gateway and its fake engine as fixtures."""

from tests.gateway import gateway, upstream

__all__ = ["gateway", "upstream"]
