"""A plain letter for what looks like it, nothing for what is not seen."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

from guardrails.views.view import View

TIMEOUT = 0.25
"""Seconds that one search of a stage may take before the text counts as unreadable (see `guardrails.spans`)."""
PLAIN = regex.compile(r"[^\x09\x0a\x0d\x20-\x7e]")
"""What plain ASCII text does not have."""
LOOKALIKES: dict[str, str] = {
    pair[0]: pair[1:]
    for pair in regex.findall(
        r"\S+",
        # Cyrillic, Armenian
        "аa вb гr еe з3 иu кk мm нh оo пn рp сc тt уy хx ьb яr іi јj ѕs ԁd ԛq ԝw һh ѵv ԍg ӏl ҽe ґr ѡw єe ёe "
        "АA ВB ЕE ЅS ІI ЈJ КK МM НH ОO РP СC ТT УY ХX ҮY ԌG ԚQ ԜW ЬB ոn սu օo հh ցg յj զq քf Օo Տs Լl "
        # Greek
        "αa βb γy δd εe ηn ιi κk νv οo ρp σo τt υu χx ωw ϲc ϳj ΑA ΒB ΕE ΖZ ΗH ΙI ΚK ΜM ΝN ΟO ΡP ΤT ΥY ΧX ϹC "
        # Latin letters that have no plain form by themselves
        "ıi ɩi ɑa ɡg ɢg ʜh ɪi ʟl ɴn ʀr ʏy ɐa ɔc ǝe ɟf ɥh ɾj ʞk ɯm ɹr ʇt ʌv ʍw ʎy ɓb ƈc ɗd ƒf ɠg ɦh ƙk ɱm ɲn ƥp ɋq ʂs "
        "ƭt ʋv ʐz ᴀa ʙb ᴄc ᴅd ᴇe ꜰf ᴊj ᴋk ᴍm ᴏo ᴘp ꜱs ᴛt ᴜu ᴠv ᴡw ᴢz ſs łl ŁL đd ĐD ħh ĦH ŧt ꓮA ꓰE ꓲI ꓳO "
        "ⲁa ⲃb ⲉe ⲓi ⲕk ⲙm ⲛn ⲟo ⲣp ⲥc ⲧt ⲩy ⲭx ᎪA ᏴB ᏟC ᎠD ᎬE ᏀG ᎻH ᎫJ ᏦK ᏞL ᎷM ᏢP ᎡR ᏚS ᎢT ᏙV ᎳW ᏃZ "
        # Braille
        "⠁a ⠃b ⠉c ⠙d ⠑e ⠋f ⠛g ⠓h ⠊i ⠚j ⠅k ⠇l ⠍m ⠝n ⠕o ⠏p ⠟q ⠗r ⠎s ⠞t ⠥u ⠧v ⠺w ⠭x ⠽y ⠵z "
        # Signs that addresses and codes are written with
        "＠@ ．. ／/ ：: －- ＿_ ％% ＝= ＆& ＋+ ∕/ ⁄/ ‐- ‑- ‒- −-"
    )
}  # fmt: skip
"""Letters by what they look like."""
KEPT = frozenset("ßæœðþøØ…™ªº²³¹·´`¨¸")
"""Letters and signs of ordinary text that are left as they are."""
NAMED = regex.compile(
    r"(?:NEGATIVE (?:CIRCLED|SQUARED)|REGIONAL INDICATOR SYMBOL|SQUARED|CIRCLED|PARENTHESIZED|TAG|(?:FULLWIDTH )?LATIN)"
    r"(?: LATIN)? (?:(?P<small>SMALL) )?(?:CAPITAL )?LETTER (?:SMALL CAPITAL )?(?P<letter>[A-Z])(?: WITH .*)?"
)
BRACKETED = regex.compile(r"\([A-Za-z]\)")
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
INVISIBLE = frozenset("\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u3164\uffa0\ufeff\u2800")


@lru_cache(maxsize=8192)
def fold(sign: str) -> str | None:
    """What a character looks like in plain letters; empty for one that is not seen, None for one that stays."""
    code, category = ord(sign), unicodedata.category(sign)
    if sign in BIDI or sign in KEPT:
        return None
    if 0xE0020 <= code <= 0xE007E:  # tags write hidden ASCII
        return chr(code - 0xE0000)
    if 0xE0100 <= code <= 0xE01EF:  # variation selectors can carry bytes
        return chr(code - 0xE0100 + 16) if 32 <= code - 0xE0100 + 16 < 127 else ""
    if category in ("Cf", "Mn", "Me") or sign in INVISIBLE or (category == "Cc" and sign not in "\t\n\r\v\f\x85"):
        return ""
    if sign in LOOKALIKES:
        return LOOKALIKES[sign]
    if category == "Zs" and sign != " ":
        return " "
    plain = unicodedata.normalize("NFKC", sign)
    if plain != sign and any(one.isascii() and one.isalnum() for one in plain):
        return plain[1] if category == "So" and BRACKETED.fullmatch(plain) else plain
    named = NAMED.fullmatch(unicodedata.name(sign, ""))
    return str(named["letter"]) if named and category == "So" else None


def folded(view: View, final: bool) -> None:
    """Everything is certain at once."""
    text = view.made_of
    while odd := PLAIN.search(text, pos=view.at):
        place = odd.start()
        view.keep(place)
        plain = fold(text[place])
        if plain is None:
            view.keep(place + 1)
        else:
            view.put(plain, place + 1)
    view.keep(len(text))
