"""Sealing: encryption of texts at rest, and signatures, with keys that come from the service's secrets.

AES-256-GCM under a key that HKDF derives from a secret for one purpose and tenant. Where a text belongs is
authenticated with it: one that is moved to another place cannot be read there. The first secret writes, all read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from app.records import Turn
from app.settings import Settings

NONCE = 12
"""Bytes of a nonce, the size that GCM is made for; a random one is good for 2**32 texts of a tenant."""
MARK = "newel-sealed-1"
"""How a sealed text begins: `newel-sealed-1:KEY:BASE64`."""
Signed = Literal["ours", "changed", "unknown"]


class Unreadable(ValueError):
    """A text that none of the secrets opens, or that was changed or moved; the message names it and never quotes it."""


def derive(secret: bytes, info: bytes) -> bytes:
    """A key of 32 bytes for one purpose (HKDF-SHA256)."""
    return HKDF(SHA256(), length=32, salt=None, info=info).derive(secret)


@lru_cache(maxsize=4096)
def _box(secret: bytes, info: bytes) -> AESGCM:
    return AESGCM(derive(secret, info))


def encrypt(secret: bytes, info: bytes, plain: bytes, place: bytes) -> bytes:
    """A random nonce and `plain`, encrypted under the key of `info` and tied to `place`."""
    nonce = secrets.token_bytes(NONCE)
    return nonce + _box(secret, info).encrypt(nonce, plain, place)


def decrypt(secret: bytes, info: bytes, data: bytes, place: bytes) -> bytes | None:
    """What `encrypt` was given; None when it was changed, or belongs elsewhere."""
    try:
        return _box(secret, info).decrypt(data[:NONCE], data[NONCE:], place)
    except (InvalidTag, ValueError):
        return None


class Seals:
    """Seals withheld texts and signs the head of the audit log, with the first of some secrets."""

    __slots__ = ("_current", "_secrets")

    def __init__(self, all_secrets: Sequence[bytes]):
        self._secrets = {derive(secret, b"newel seal key id").hex()[:8]: secret for secret in all_secrets}
        self._current = next(iter(self._secrets))

    def seal(self, tenant: str, turn: str, kind: str, text: str) -> str:
        """The text, sealed for this place; an empty one stays empty."""
        if not text:
            return ""
        plain = text.encode("utf-8", "surrogatepass")
        data = encrypt(self._secrets[self._current], _info(tenant), plain, _place(tenant, turn, kind))
        return f"{MARK}:{self._current}:{base64.b64encode(data).decode()}"

    def unseal(self, tenant: str, turn: str, kind: str, sealed: str) -> str:
        """The text that was sealed for this place; one that was stored in clear, before texts were sealed, as it is.

        Raises Unreadable.
        """
        if not is_sealed(sealed):
            return sealed
        key, data = _parts(sealed)
        secret = self._secrets.get(key)
        if secret is None:
            raise Unreadable(f"the withheld text ({kind}) of {turn}: its secret is not in [vault] old_secrets")
        plain = decrypt(secret, _info(tenant), data, _place(tenant, turn, kind))
        if plain is None:
            raise Unreadable(f"the withheld text ({kind}) of {turn} was changed, or belongs elsewhere")
        text = plain.decode("utf-8", "surrogatepass")
        try:  # sealed once more, when it came from the spill and its secret was not here
            return self.unseal(tenant, turn, kind, text)
        except Unreadable:
            return text

    @property
    def current_key(self) -> str:
        """The id of the secret that seals, as it stands in what is sealed."""
        return self._current

    def sealed(self, turn: Turn) -> Turn:
        """The turn with its withheld texts sealed, for the spill; the same one where there are none."""
        if not (turn.withheld_asked or turn.withheld_said):
            return turn
        asked = self.seal(turn.tenant, turn.id, "asked", turn.withheld_asked)
        said = self.seal(turn.tenant, turn.id, "said", turn.withheld_said)
        return replace(turn, withheld_asked=asked, withheld_said=said)

    def unsealed(self, turn: Turn) -> Turn:
        """A turn from the spill with its withheld texts as they were written; what no secret opens stays sealed."""
        if not (turn.withheld_asked or turn.withheld_said):
            return turn
        asked = self._opened(turn, "asked", turn.withheld_asked)
        said = self._opened(turn, "said", turn.withheld_said)
        return replace(turn, withheld_asked=asked, withheld_said=said)

    def _opened(self, turn: Turn, kind: str, text: str) -> str:
        try:
            return self.unseal(turn.tenant, turn.id, kind, text)
        except Unreadable:
            return text

    def signed(self, head: str) -> tuple[str, str]:
        """(the id of the secret, an HMAC-SHA256) of a head of the audit log."""
        return self._current, _mac(self._secrets[self._current], head)

    def signature(self, head: str, key: str, mac: str) -> Signed:
        """Whose signature that is: `unknown` when none of the secrets is the one that it names."""
        if key not in self._secrets:
            return "unknown" if key else "changed"
        return "ours" if hmac.compare_digest(_mac(self._secrets[key], head), mac) else "changed"


def is_sealed(text: str) -> bool:
    """True for what `seal` returns; nobody's words have this form by chance."""
    if not text.startswith(f"{MARK}:"):
        return False
    try:
        return len(_parts(text)[1]) > NONCE
    except (ValueError, binascii.Error):
        return False


def _parts(sealed: str) -> tuple[str, bytes]:
    _, key, data = sealed.split(":")
    return key, base64.b64decode(data, validate=True)


def _info(tenant: str) -> bytes:
    return b"newel withheld\0" + tenant.encode("utf-8", "surrogatepass")


def _place(tenant: str, turn: str, kind: str) -> bytes:
    return orjson.dumps([tenant, turn, kind])


@lru_cache(maxsize=64)
def _mac_key(secret: bytes) -> bytes:
    return derive(secret, b"newel audit head")


def _mac(secret: bytes, head: str) -> str:
    return hmac.new(_mac_key(secret), head.encode(), hashlib.sha256).hexdigest()


# --- the secrets


def secret_in(folder: Path) -> bytes:
    """The secret in the file `secret` of a folder, which is made once (mode 0600)."""
    path = folder / "secret"
    if path.exists():
        return path.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f".secret.{secrets.token_hex(4)}"
    with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):  # whole or not at all: another process may have been first, or read meanwhile
        os.link(own, path)
    own.unlink()
    return path.read_bytes()


def read_secret(settings: Settings) -> bytes:
    """The key of this service's HMACs: from the settings, else a file in `home` that is made once (mode 0600)."""
    return settings.secret.get_secret_value().encode() if settings.secret else secret_in(settings.home)


def sealing_secrets(settings: Settings, own: bytes) -> list[bytes]:
    """What is sealed at rest is sealed with the first of these, and read with all; `own` is the service's secret."""
    chosen = settings.vault
    current = chosen.secret.get_secret_value().encode() if chosen.secret else own
    return [current, *(one.get_secret_value().encode() for one in chosen.old_secrets), own]
