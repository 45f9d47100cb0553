"""Hosts of addresses as a browser reads them (WHATWG URL), and the endings by which a bare domain is told."""

from __future__ import annotations

import unicodedata
from itertools import groupby
from urllib.parse import unquote

import regex

GENERIC = (
    "academy agency app art asia associates bank bar best bid biz blog boutique business cafe camera capital care "
    "careers cash cat center chat church city click clinic cloud club co coach codes coffee college com community "
    "company computer consulting cool coop credit cyou date deals delivery dental design dev diet digital direct "
    "directory doctor download edu education email energy engineer equipment estate events exchange expert express "
    "family fan farm fashion film finance financial fit flights fm foundation fun fund fyi gallery game games gift "
    "glass global gmbh gold gov graphics green group guide guru health help holdings hospital host hosting house icu "
    "immo inc industries info ink institute insure int international investments io jobs kim land law lease legal "
    "life limited link live llc loan loans lol love ltd ly management market marketing mba media mil mobi moda money "
    "monster name net network news ninja nl one onl online org page partners parts party pay pet phone photo photos "
    "pics pizza plus porn press pro productions promo properties pub quest racing realty recipes red rehab reisen "
    "rent rentals repair report rest restaurant review reviews rip rocks run sale sbs school science security "
    "services sexy shoes shop shopping show site ski social software solar solutions space store stream studio style "
    "support surf systems taxi team tech technology tel theater tips tires today tokyo tools top tours town toys "
    "trade training travel tube university uno vacations ventures vet video vip vision vodka vote voyage wang watch "
    "webcam website wedding wiki win wine work works world wtf xxx xyz yoga zone onion"
)
COUNTRIES = (
    "ac ad ae af ag ai al ao aq ar au aw ax az ba bb bd bf bg bh bi bj bm bn bo br bs bt bw bz ca cd cf cg ch ci ck cl "
    "cm cn cr cu cv cw cx cy cz de dj dk dm dz ec ee eg er es et eu fi fj fk fo fr ga gb gd ge gf gg gh gi gl gm gn gp "
    "gq gr gs gt gu gw gy hk hm hn hr ht hu ie il im iq ir je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk "
    "lr ls lt lu lv ma mc mg mh mk mn mo mp mq mr ms mt mu mv mw mx mz na nc ne nf ng ni np nr nu nz om pa pe pf pg ph "
    "pk pm pn pr pt pw qa re ro ru rw sa sb sc sd se sg si sk sl sm sn sr ss st su sv sx sy sz tc td tf tg th tj tk "
    "tl tm tn tr tt tv tw tz ua ug uk uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw рф рус укр ею 中国 中國 公司 "
    "网络 在线 香港 台湾 한국 भारत ไทย ελ"
)
WORDLIKE = "am as at be by do id in is it me my no so to us"
"""Endings that are words: `finished.it was` is a missing space, `login.evil.it` and `evil.it/x` are addresses."""
FILELIKE = "cc md ml mov pl ps py rs sh zip"
"""Endings that files have: `main.py` is a file, `evil.py/x` and `www.evil.py` are addresses."""


def choice(*lists: str) -> str:
    """A pattern for any of the words in the lists, sorted by their first letters so that it fails fast."""
    return "|".join(
        f"{first}(?:{'|'.join(sorted((word[1:] for word in group), reverse=True))})"
        for first, group in groupby(
            sorted({word for words in lists for word in words.split()}), key=lambda word: word[0]
        )
    )


DOT = "[.。．｡]"
LABEL = r"[\p{L}\p{N}][\p{L}\p{M}\p{N}\p{Cf}_-]{0,62}"
AFTER = r"(?![\p{L}\p{N}_@-]|\.[\p{L}\p{N}])"
SURE = f"(?:{choice(GENERIC, COUNTRIES)}|xn--[a-z0-9-]{{2,50}}){AFTER}"
TAIL = r"(?=[/\\?#]\S|:[0-9])"
BARE = (
    rf"(?:(?:{LABEL}{DOT}){{1,8}}{SURE}|(?:{LABEL}{DOT}){{2,8}}(?:{choice(WORDLIKE)}){AFTER}"
    rf"|(?:{LABEL}{DOT}){{1,8}}(?:{choice(WORDLIKE, FILELIKE)}){AFTER}{TAIL}"
    rf"|www{DOT}(?:{LABEL}{DOT}){{1,8}}(?:{choice(WORDLIKE, FILELIKE)}){AFTER})"
)
"""A host with a known ending, without a scheme before it."""
PRODUCTS = frozenset({"asp.net", "vb.net", "ado.net", "ml.net", "socket.io"})
"""Names of products that look like hosts."""

PAIRS = (
    "аa вb сc еe ԁd һh іi јj ӏl кk мm оo ԛq рp ѕs тt ѵv ԝw хx уy үy ԍg пn αa ιi κk οo νv ηn υu χx ρp τt γy ɑa ɡg ıi "
    "łl օo ցg հh ոn սu զq ꓳo"
)
LOOKALIKES = {pair[0]: pair[1] for pair in PAIRS.split()}
"""Letters of other alphabets, and the small Latin letters that they look like."""
LATIN = regex.compile(r"\p{Latin}")
OTHER = regex.compile(r"[\p{Cyrillic}\p{Greek}\p{Armenian}\p{Cherokee}]")
NUMBER = regex.compile("0x[0-9a-f]*|[0-9]+")


def plain(host: str) -> str:
    """A host in one form: percent-decoded, compatible letters (NFKC) small, invisible ones gone, `xn--` read."""
    text = regex.sub(r"[\p{Cf}]", "", unicodedata.normalize("NFKC", unquote(host)).replace("。", ".")).lower()
    return ".".join(_read(label) for label in text.strip(".").split("."))


def _read(label: str) -> str:
    """A label in Unicode; one that cannot be decoded (RFC 3492) stays as it is."""
    if not label.startswith("xn--"):
        return label
    try:
        return label[4:].encode("ascii").decode("punycode").lower()
    except (UnicodeError, IndexError, OverflowError):
        return label


def is_address(host: str) -> bool:
    """True for an IP address in any of the ways that a browser reads: dotted, one integer, hexadecimal, in brackets."""
    return host.startswith("[") or NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def is_disguised(host: str) -> bool:
    """True for an IP address that is not written as four decimal numbers or in brackets."""
    parts = host.split(".")
    simple = len(parts) == 4 and all(NUMBER.fullmatch(part) and (part == "0" or part[0] != "0") for part in parts)
    return is_address(host) and not host.startswith("[") and not simple


def imitates(host: str) -> bool:
    """True where a label mixes alphabets, or spells Latin letters with those of another alphabet."""
    return any(_imitates(label) for label in host.split("."))


def _imitates(label: str) -> bool:
    if label.isascii():
        return False
    looks = "".join(LOOKALIKES.get(letter, letter) for letter in label)
    return looks.isascii() or bool(LATIN.search(label) and OTHER.search(label))
