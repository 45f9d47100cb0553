"""A chat request that a request of another API was made into: it goes the same road, and remembers what it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel, PrivateAttr

from app.errors import ApiError
from app.records import Key
from app.schemas import ChatRequest, json_object, validated
from app.surfaces.chat import block_mode


class Translated(ChatRequest):
    """A chat request that was something else: `origin`, the request as it was sent."""

    _origin: Any = PrivateAttr(None)
    _idle: tuple[str, ...] = PrivateAttr(())

    @property
    def origin(self) -> Any:
        """The request of the other API; its surface knows of which kind it is."""
        return self._origin

    def ignored(self, without: Collection[str] = ()) -> list[str]:
        """As `ChatRequest.ignored`, with what the other API's clients send and has no effect."""
        return [*super().ignored(without), *self._idle]


def read(
    kind: type[BaseModel],
    chat: Callable[[Any], dict[str, Any]],
    body: bytes,
    key: Key,
    headers: Mapping[bytes, bytes],
    *,
    names: Mapping[str, str],
    idle: Collection[str] = (),
) -> Translated:
    """The request as a chat request; raises ApiError 400.

    kind: the model of the other API's body; chat: makes the body of a chat completion of it. names: what is called
    otherwise there, for mistakes that only show in the chat request. idle: fields that have no effect.
    """
    data = json_object(body)
    allowed = {name: data.pop(name) for name in key.limits.allow if name in data and name not in kind.model_fields}
    origin = validated(kind, data)
    try:
        asked = validated(Translated, {name: value for name, value in chat(origin).items() if value is not None})
    except ApiError as error:
        raise _renamed(error, names) from None
    asked.__dict__.update(allowed=allowed, block_mode=block_mode(key, headers))
    asked._origin = origin
    asked._idle = tuple(name for name in idle if getattr(origin, name))
    return asked


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error in the words of the other API."""
    message, param = error.message, error.param or ""
    for old, new in names.items():
        if param == old or param.startswith((f"{old}[", f"{old}.")):
            message, param = message.replace(f"'{param}'", f"'{new}'"), new
    return ApiError(400, message, code=error.code, param=param or None)


def joined(value: object, kinds: Collection[str], between: str = "") -> object:
    """The text of a list of text parts of these kinds; anything else as it is. Raises ValueError for other parts."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text", part.get("refusal")) for part in value if isinstance(part, dict) and _is(part, kinds)]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(value):
        raise ValueError(f"only text parts are served: {', '.join(kinds)}")
    return between.join(strings)


def _is(part: Mapping[str, Any], kinds: Collection[str]) -> bool:
    return part.get("type") in kinds
