"""Fields of an engine's answer that nobody here reads: they are passed on byte by byte, unless they could hold text.

What a model says reaches a client through the output rules alone. A field of another name could carry it past them, so
one whose strings are more than identifiers is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from app.frames import More

TELLING = frozenset(("token_ids", "prompt_token_ids", "prompt_logprobs", "prompt_text", "kv_transfer_params"))
"""Fields that hold text in another form."""
_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_PLAIN = re.compile(rb"[\w.:/+=@-]{0,64}")


def passed(more: More) -> More | None:
    """The fields that may be passed on; None where there are none."""
    message = {name: raw for name, raw in _safe(more.message).items() if b'"' not in raw}  # a token is a short string
    kept = More(_safe(more.top), _safe(more.choice), message, _safe(more.usage))
    return kept if kept.top or kept.choice or kept.message or kept.usage else None


def _safe(fields: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: raw for name, raw in fields.items() if name not in TELLING and is_plain(raw)}


def is_plain(raw: bytes) -> bool:
    """True for JSON whose strings, names of fields included, are identifiers."""
    return all(_PLAIN.fullmatch(one) for one in _STRING.findall(raw))
