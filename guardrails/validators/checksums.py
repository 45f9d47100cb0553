"""Check digits that python-stdnum does not know: those of tokens, wallets and devices."""

from __future__ import annotations

import zlib
from hashlib import sha256

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def crc62(text: str) -> str:
    """The CRC-32 of the text in base 62, six characters: how GitHub and npm end their tokens."""
    rest, out = zlib.crc32(text.encode()), ""
    while rest:
        rest, digit = divmod(rest, 62)
        out = BASE62[digit] + out
    return out.rjust(6, "0")


def base58(text: str) -> bytes:
    """What base 58 with four check bytes stands for (Bitcoin), without them; empty where they are wrong."""
    number = 0
    for sign in text:
        place = BASE58.find(sign)
        if place < 0:
            return b""
        number = number * 58 + place
    zeros = len(text) - len(text.lstrip("1"))
    whole = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8)
    body, check = whole[:-4], whole[-4:]
    return body if sha256(sha256(body).digest()).digest()[:4] == check else b""


def is_bech32(text: str) -> bool:
    """True where the six check characters are right (BIP 173 and BIP 350)."""
    prefix, mark, data = text.lower().rpartition("1")
    if not mark or text not in (text.lower(), text.upper()) or set(data) - set(BECH32):
        return False
    values = [ord(sign) >> 5 for sign in prefix] + [0] + [ord(sign) & 31 for sign in prefix]
    check = 1
    for value in values + [BECH32.index(sign) for sign in data]:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for i, one in enumerate(_GENERATOR):
            check ^= one if top >> i & 1 else 0
    return check in (1, 0x2BC830A3)


def is_eip55(address: str) -> bool:
    """True where the capitals of an Ethereum address are those that its hash asks for (EIP-55)."""
    digits = address.removeprefix("0x")
    code = keccak256(digits.lower().encode()).hex()
    return all(
        sign.isdigit() or sign.isupper() == (int(nibble, 16) >= 8) for sign, nibble in zip(digits, code, strict=False)
    )


def keccak256(text: bytes) -> bytes:
    """The Keccak hash of less than 136 bytes, as it was before it became SHA-3."""
    block = text + b"\x01" + bytes(134 - len(text)) + b"\x80" if len(text) < 135 else text + b"\x81"
    lanes = [int.from_bytes(block[i : i + 8], "little") for i in range(0, 136, 8)] + [0] * 8
    state, seed = [[lanes[x + 5 * y] for y in range(5)] for x in range(5)], 1
    for _ in range(24):
        columns = [a ^ b ^ c ^ d ^ e for a, b, c, d, e in state]
        spread = [columns[x - 1] ^ _turn(columns[(x + 1) % 5], 1) for x in range(5)]
        state = [[lane ^ spread[x] for lane in state[x]] for x in range(5)]
        x, y, current = 1, 0, state[1][0]
        for step in range(24):
            x, y = y, (2 * x + 3 * y) % 5
            current, state[x][y] = state[x][y], _turn(current, (step + 1) * (step + 2) // 2)
        state = [[state[x][y] ^ (~state[(x + 1) % 5][y] & state[(x + 2) % 5][y]) for y in range(5)] for x in range(5)]
        for j in range(7):
            state[0][0] ^= (seed & 1) << ((1 << j) - 1)
            seed = seed << 1 ^ (0x171 if seed >> 7 else 0)
    return b"".join((state[i][0] & (1 << 64) - 1).to_bytes(8, "little") for i in range(4))


def _turn(lane: int, by: int) -> int:
    """Sixty-four bits turned to the left."""
    lane &= (1 << 64) - 1
    return (lane << by % 64 | lane >> 64 - by % 64) & (1 << 64) - 1
