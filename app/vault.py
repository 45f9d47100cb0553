"""The vault of the service: values behind placeholders, encrypted in the store, each for its owner alone.

A value is encrypted with AES-256-GCM under a key that HKDF derives from a secret for one tenant. Tenant, conversation,
owner and placeholder are authenticated with it: a row that is moved to another place cannot be read there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import orjson

from app.logs import event
from app.records import Turn, now
from app.sealing import Unreadable, decrypt, derive, encrypt, sealing_secrets
from app.settings import Settings
from app.store import Conflict, Owner, Sealed, Store
from guardrails.types import Message
from guardrails.vault import Entry, Vault

SWEEP = 60.0
"""Seconds between two deletions of what has expired."""


def owner_of(turn: Turn) -> Owner:
    """Whose values those of this turn are.

    Without a person's pseudonym nobody can be told from another: two may name the same conversation, or have said the
    same words. The values then belong to the turn alone, and the next turn finds them in the history it was sent.
    """
    return Owner(turn.tenant, turn.conversation, turn.subject or f"turn:{turn.id}")


class Cipher:
    """Encrypts values with the first of some secrets, and reads what any of them encrypted."""

    __slots__ = ("_current", "_secrets")

    def __init__(self, all_secrets: Sequence[bytes]):
        self._secrets = {derive(secret, b"newel vault key id").hex()[:8]: secret for secret in all_secrets}
        self._current = next(iter(self._secrets))

    def seal(self, owner: Owner, entry: Entry) -> Sealed:
        """The value, encrypted for this owner and placeholder."""
        secret, place = self._secrets[self._current], _place(owner, entry.placeholder)
        return Sealed(entry.placeholder, self._current, encrypt(secret, _info(owner), entry.value.encode(), place))

    def open(self, owner: Owner, sealed: Sealed) -> Entry:
        """The value and its placeholder; raises Unreadable."""
        secret = self._secrets.get(sealed.key)
        if secret is None:
            raise Unreadable(f"{sealed.placeholder}: its secret is not in [vault] old_secrets")
        plain = decrypt(secret, _info(owner), sealed.data, _place(owner, sealed.placeholder))
        if plain is None:
            raise Unreadable(f"{sealed.placeholder}: it was changed, or belongs elsewhere")
        return Entry(sealed.placeholder, plain.decode())


def _info(owner: Owner) -> bytes:
    """What the key of one tenant is derived for."""
    return b"newel vault\0" + owner.tenant.encode()


def _place(owner: Owner, placeholder: str) -> bytes:
    """Where a value belongs, as the associated data of its encryption."""
    return orjson.dumps([owner.tenant, owner.conversation, owner.name, placeholder])


class Vaults:
    """Opens the vault of a turn, and keeps what the turn put into it."""

    __slots__ = ("_cipher", "_store", "_ttl")

    def __init__(self, store: Store, cipher: Cipher, ttl: float):
        self._store, self._cipher, self._ttl = store, cipher, timedelta(seconds=ttl)

    async def open(self, turn: Turn, messages: Sequence[Message]) -> Vault:
        """The vault of the turn's owner, before anything in these messages is sealed; raises StoreDown.

        Placeholders that stand in the messages already are not given out. What we have said ourselves does not count:
        a placeholder that was left in a link means its value.
        """
        sealed = await self._store.sealed_values(owner_of(turn)) if turn.subject else []
        known, unreadable = self._read(turn, sealed)
        vault = Vault(known)
        vault.reserve([*unreadable, *(message.content for message in messages if message.role != "assistant")])
        return vault

    async def values_of(self, turn: Turn) -> Mapping[str, str]:
        """What the placeholders of a turn stand for, to tell it again; raises StoreDown."""
        known, _ = self._read(turn, await self._store.sealed_values(owner_of(turn)))
        return Vault(known).values

    async def keep(self, turn: Turn, vault: Vault) -> bool:
        """True when all that is in the vault is kept from now on for another `ttl`; raises StoreDown.

        False when another turn of the conversation gave out one of the new placeholders meanwhile: then the vault has
        to be opened and filled anew.
        """
        if not vault.values:
            return True
        owner = owner_of(turn)
        new = [self._cipher.seal(owner, entry) for entry in vault.new]
        try:
            await self._store.keep_values(owner, new, now() + self._ttl)
        except Conflict:
            return False
        return True

    async def hidden(self, turn: Turn, text: str) -> str:
        """`text`, which somebody wrote about a turn, with placeholders for its values; raises StoreDown."""
        known, _ = self._read(turn, await self._store.sealed_values(owner_of(turn)))
        return Vault(known).hide(text, everywhere=True)

    async def reveal(self, turn: Turn, actor: str, reason: str) -> dict[str, str]:
        """The values behind the placeholders of a turn that have not expired, for somebody who needs them: audited."""
        sealed = await self._store.reveal_values(owner_of(turn), turn.id, actor, reason)
        messages = (*turn.history, *turn.calls)
        said = "\n".join((turn.asked, turn.said, turn.reasoning, *(message.content for message in messages)))
        known, _ = self._read(turn, sealed)
        return {entry.placeholder: entry.value for entry in known if entry.placeholder in said}

    async def sweep(self) -> None:
        """Deletes what has expired."""
        await self._store.delete_expired_values()

    def _read(self, turn: Turn, sealed: Sequence[Sealed]) -> tuple[list[Entry], list[str]]:
        """(what can be read, the placeholders of what cannot)."""
        known, unreadable = list[Entry](), list[str]()
        for one in sealed:
            try:
                known.append(self._cipher.open(owner_of(turn), one))
            except Unreadable:
                unreadable.append(one.placeholder)
        if unreadable:
            event("vault_unreadable", logging.WARNING, turn=turn.id, tenant=turn.tenant, values=len(unreadable))
        return known, unreadable


def open_vaults(store: Store, settings: Settings, secret: bytes) -> Vaults:
    """The vaults as they are set up; `secret` is the service's own."""
    return Vaults(store, Cipher(sealing_secrets(settings, secret)), settings.vault.ttl)


def opened(settings: Settings, secret: bytes, values: Sequence[tuple[Owner, Sealed]]) -> list[tuple[Owner, Entry]]:
    """These values in clear, without those that cannot be read; `secret` is the service's own."""
    cipher, found = Cipher(sealing_secrets(settings, secret)), list[tuple[Owner, Entry]]()
    for owner, one in values:
        with suppress(Unreadable):
            found.append((owner, cipher.open(owner, one)))
    return found
