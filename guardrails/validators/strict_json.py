"""JSON read so that nobody downstream can read it differently: one value, no key twice, no NaN, nothing too deep."""

from __future__ import annotations

import json
from typing import TypeAlias

import regex

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
DEEPEST = 64
"""Brackets within brackets."""
DIGITS = 100
"""Characters of a number."""
SHAPE = regex.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', regex.DOTALL)


class Unreadable(ValueError):
    """A text that is no strict JSON; the message says why and where, and quotes nothing."""


def read(text: str) -> Json:
    """The value that the text is; raises Unreadable."""
    _check_depth(text)
    try:
        value: Json = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON at character {error.pos}: {error.msg.partition(':')[0].lower()}") from None
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for token in SHAPE.finditer(text):
        sign = token.group()
        depth += (sign in "[{") - (sign in "]}")
        if depth > DEEPEST:
            raise Unreadable(f"deeper than {DEEPEST} brackets at character {token.start()}")


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Unreadable("a key stands twice in one object")
    return made


def _constant(_: str) -> Json:
    raise Unreadable("NaN and Infinity are not JSON")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise Unreadable(f"a number of more than {DIGITS} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if len(digits) > DIGITS or value in (float("inf"), float("-inf")):
        raise Unreadable("a number that is too large")
    return value
