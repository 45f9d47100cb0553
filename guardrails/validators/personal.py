"""Personal data: addresses, numbers and identifiers that belong to one person, checked by their check digits.

Identifiers without a shape of their own count only after a word that announces them ("BSN 111222333").
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from stdnum import iban, imei, luhn
from stdnum.us import rtn

from guardrails.spans import PRECISE, Span, Spans
from guardrails.types import Finding
from guardrails.validators import phones
from guardrails.validators.checksums import BASE58, base58, is_bech32, is_eip55
from guardrails.validators.identifiers import IDENTIFIERS, SEP, Announced

Kind = Literal[
    "email", "phone", "card", "iban", "date_of_birth", "ip", "bank_account", "us_routing", "uk_sort_code",
    "crypto_wallet", "imei", "mac_address", "passport", "driving_licence", "street_address", "person_name",
    "ar_cuil", "at_svnr", "au_tfn", "be_national_number", "bg_egn", "br_cpf", "ca_sin", "ch_ahv", "cl_rut", "cn_ric",
    "cz_rodne_cislo", "de_tax_id", "dk_cpr", "do_cedula", "ec_cedula", "ee_isikukood", "es_dni", "es_nie", "fi_hetu",
    "fr_nir", "gb_utr", "gr_amka", "hr_oib", "id_nik", "ie_pps", "il_id", "in_aadhaar", "in_pan", "in_voter_id",
    "is_kennitala", "it_codice_fiscale", "jp_my_number", "kr_rrn", "lt_asmens_kodas", "lv_personas_kods", "mx_curp",
    "mx_rfc", "my_nric", "nl_bsn", "no_fodselsnummer", "nz_ird", "pk_cnic", "pl_pesel", "pt_nif", "ro_cnp", "ru_inn",
    "se_personnummer", "sg_nric", "si_emso", "th_id", "tr_kimlik", "ua_rntrc", "uk_nhs", "uk_nino", "us_itin",
    "us_medicare", "us_ssn", "za_id",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
OFF: tuple[Kind, ...] = ("ip", "mac_address", "person_name")


class Options(BaseModel):
    """Which kinds of personal data to find."""

    model_config = ConfigDict(extra="forbid")
    kinds: list[Kind] = Field(
        default=[kind for kind in KINDS if kind not in OFF],
        min_length=1,
        description="What to find, by label. Off by default: `ip`, since version numbers look like addresses;"
        " `mac_address`; `person_name`, found only where people say theirs.",
    )
    regions: list[str] = Field(
        default=["US", "GB"],
        description="Countries (ISO 3166, two letters; EU for all of its members) whose phone numbers are known without"
        " the `+` and country code.",
    )
    allow: list[str] = Field(
        default=[],
        description="What may be said all the same, in any case: one's own addresses and numbers, such as `*@acme.com` "
        "or `+1 800 555 0100` (`*` stands for anything, separators do not count).",
    )


START = r"(?<![0-9A-Za-z])(?<![0-9][.,/:-])"
"""Where a number starts that belongs to no longer one."""

EMAIL = (
    r"(?<!\w)(?!git@)\w(?:[\w.%+'-]{0,62}[\w%+-])?@"
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:xn--[\w-]{2,59}|[^\W\d_]{2,24})"
)
SPELLED_EMAIL = (
    r"(?<!\w)\w[\w.%+-]{0,63}\s?[\[({<]\s?at\s?[\])}>]\s?[\w-]{1,63}"
    r"(?:\s?(?:\.|[\[({<]\s?dot\s?[\])}>])\s?[\w-]{2,63}){1,4}"
)
FILES = ("png", "jpg", "jpeg", "gif", "svg", "webp")


def _is_address(text: str) -> bool:
    """False for file names such as `icon@2x.png`."""
    return text.rpartition(".")[2].lower() not in FILES


def _email() -> list[Span]:
    return [Span("email", EMAIL, _is_address), Span("email", f"(?i:{SPELLED_EMAIL})")]


# First digits and lengths of the schemes that issue cards to persons (ISO/IEC 7812).
ISSUERS = (
    (("4",), (13, 16, 19)),
    (("34", "37"), (15,)),
    ((*map(str, range(51, 56)), *map(str, range(2221, 2721))), (16,)),
    (("6011", "622", "64", "65", "60", "81", "82", "62"), (16, 17, 18, 19)),
    ((*map(str, range(3528, 3590)), *map(str, range(2200, 2205))), (16, 17, 18, 19)),
    (("300", "301", "302", "303", "304", "305", "3095", "36", "38", "39"), (14, 16)),
    (("5018", "5020", "5038", "5893", "6304", "6759", "6761", "6762", "6763", "508"), (16, 17, 18, 19)),
)
LENGTHS = {prefix: lengths for prefixes, lengths in ISSUERS for prefix in prefixes}


def _is_card(text: str) -> bool:
    """True for digits of a known issuer and length whose Luhn check digit is right."""
    digits = "".join(filter(str.isdigit, text))
    known = any(len(digits) in LENGTHS.get(digits[:n], ()) for n in (1, 2, 3, 4))
    return known and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


def _card() -> list[Span]:
    """The card shapes: unbroken, in fours, American Express, Diners, nineteen digits, digit by digit."""
    groups = ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (1,) * 16)
    shapes = [SEP.join(f"[0-9]{{{size}}}" for size in sizes) for sizes in groups]
    return [
        Span("card", rf"(?<![0-9])(?<![0-9]\.)(?:{shape})(?![0-9])", _is_card) for shape in ("[0-9]{13,19}", *shapes)
    ]


# Length of the whole number by country, from the SWIFT IBAN registry.
IBAN_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip


def _iban() -> list[Span]:
    """One shape a length, so that the word after an IBAN is never taken for its end."""
    shapes = (
        rf"(?:(?<=(?:{'|'.join(countries.split())})[0-9]{{2}})(?:{SEP}?[A-Z0-9]){{{length - 4}}})"
        for length, countries in IBAN_LENGTHS.items()
    )
    pattern = rf"(?i:(?<![A-Z0-9])[A-Z]{{2}}[0-9]{{2}}(?:{'|'.join(shapes)})(?![A-Z0-9]))"
    return [Span("iban", pattern, iban.is_valid)]


MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
DAY, YEAR = r"(?:0?[1-9]|[12][0-9]|3[01])(?:st|nd|rd|th)?", r"(?:19|20)[0-9]{2}"
DATE = (
    rf"{YEAR}[-/.](?:0?[1-9]|1[0-2])[-/.]{DAY}|{DAY}[-/. ]{{1,2}}(?:[0-3]?[0-9][-/. ]{{1,2}}|(?:of )?{MONTH},?[ -])"
    rf"(?:{YEAR}|[0-9]{{2}})|(?:1[0-2]|0?[1-9])[-/.]{DAY}[-/.](?:{YEAR}|[0-9]{{2}})|{MONTH} {DAY},? {YEAR}"
)
BORN = (
    r"born|birth\s?date|birthday|date of birth|d\.?o\.?b\.?|geboren|geburtsdatum|geb\.|n[ée]e? le|date de naissance"
    r"|nacid[oa]|fecha de nacimiento|nat[oa] il|geboortedatum"
)


def _date_of_birth() -> list[Span]:
    """A full date right after a word for birth; the year alone is not enough to tell a person."""
    between = r"[\s:=,(*\"-]{0,4}(?:(?:is|was|on|the|am|el|op)[\s:]{1,3}){0,2}"
    return [Span("date_of_birth", rf"(?i:(?<!\w)(?:{BORN}){between}(?P<date>{DATE})(?![0-9]))", group="date")]


def _is_ip(text: str) -> bool:
    """True for an address that the standard library reads; in IPv6, one with a digit and at least two colons."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.version == 4 or (text.count(":") > 1 and any(map(str.isdigit, text)))


def _ip() -> list[Span]:
    version_4 = r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])"
    return [Span("ip", version_4, _is_ip), Span("ip", r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?:%\w{1,15})?(?![\w:])", _is_ip)]


def _bank() -> list[Span]:
    """Numbers of accounts, announced; of banks with their check digits, where they have any."""
    account = (
        r"(?:bank|checking|savings|current|giro) acc(?:oun)?t\w{0,4}|acc(?:oun)?t\.? (?:no\b|number|#)|kontonummer"
    )
    end = "(?![0-9A-Za-z-])"
    return [
        Announced("bank_account", rf"{START}[0-9]{{8,17}}{end}", account, lambda text: len(set(text)) > 1),
        Announced("us_routing", rf"{START}[0-9]{{9}}{end}", r"routing|aba|rtn", rtn.is_valid),
        Announced("uk_sort_code", rf"{START}[0-9]{{2}}(?:[ -]?[0-9]{{2}}){{2}}{end}", "sort ?code", bool),
    ]


def _wallet() -> list[Span]:
    """Addresses of Bitcoin and Ethereum; an Ethereum address without capitals has no check digits."""
    ethereum, words = rf"{START}0x[0-9a-fA-F]{{40}}(?![0-9A-Za-z])", "eth|ethereum|wallet|address"
    return [
        Span(
            "crypto_wallet",
            rf"{START}[13][{BASE58}]{{25,34}}(?![0-9A-Za-z])",
            lambda text: base58(text)[:1] in (b"\0", b"\5"),
        ),
        Span("crypto_wallet", rf"{START}(?i:bc1)[0-9a-zA-Z]{{11,71}}(?![0-9A-Za-z])", is_bech32),
        Span("crypto_wallet", ethereum, lambda text: text[2:].lower() != text[2:] and is_eip55(text)),
        Announced("crypto_wallet", ethereum, words, str.islower),
    ]


def _device() -> list[Span]:
    """Numbers of telephones, announced, and of network cards."""
    shape = rf"{START}[0-9]{{2}}[ -]?[0-9]{{6}}[ -]?[0-9]{{6}}[ -]?[0-9](?![0-9A-Za-z])"
    card = "(?:(?:[0-9A-Fa-f]{2}:){5}|(?:[0-9A-Fa-f]{2}-){5})[0-9A-Fa-f]{2}"
    return [
        Announced("imei", shape, "imei", imei.is_valid),
        Span("mac_address", rf"(?<![\w:-]){card}(?![\w:-])", lambda text: len(set(text.lower())) > 3),
    ]


def _papers() -> list[Span]:
    """Numbers of passports and of licences to drive, announced; states write them in many ways."""
    passport = "(?:[A-Z]{1,2}[0-9]{6,8}|[0-9]{9}|[CFGHJKLMNPRTVWXYZ][0-9CFGHJKLMNPRTVWXYZ]{8}|[0-9]{2}[A-Z]{2}[0-9]{5})"
    licence = "(?:[A-Z][A-Z0-9]{4}[0-9]{6}[A-Z0-9]{5}|[A-Z]{1,3}[0-9]{5,14}|[0-9]{7,9})"
    drive = (
        r"driv(?:er|ing)['’]?s? licen[cs]e|dl (?:no|number|#)|führerschein\w{0,7}|permis de conduire"
        r"|licencia de conducir|rijbewijs\w{0,6}|patente di guida"
    )
    passes = r"passport|reisepass\w{0,7}|passeport|pasaporte|passaporto|paspoort\w{0,6}|passaporte"
    digits = lambda text: sum(map(str.isdigit, text)) >= 5  # noqa: E731
    return [
        Announced("passport", rf"{START}{passport}(?![0-9A-Za-z])", passes, digits),
        Announced("driving_licence", rf"{START}{licence}(?![0-9A-Za-z])", drive, digits),
    ]


WAY = (
    "(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Square|Terrace|Way|Crescent|Close"
    r"|Parkway|Pkwy|Highway|Hwy|Gardens|Grove|Mews)(?![\w])\.?"
)
LIVES = (
    r"address|liv(?:e|es|ing)|reside[sd]?|ship|deliver"
    r"|moved|wohn\w{0,4}|adresse|anschrift|j['’]habite|domicile|vivo|dirección|domicilio"
)


def _street() -> list[Span]:
    """A house number and a street right after a word for living there, up to the town and its number."""
    name = r"(?:[\p{Lu}0-9][\w.'’-]{0,20} ){1,4}"
    flat = r"(?:,? (?:Apt|Apartment|Suite|Ste|Unit|Flat|#)\.? ?\w{1,6})?"
    code = r"(?:[A-Z]{2} [0-9]{5}(?:-[0-9]{4})?|[A-Z]{1,2}[0-9][0-9A-Z]? [0-9][A-Z]{2})"
    town = rf"(?:,? (?:\p{{Lu}}[\w.'’-]{{1,20}} ?){{1,3}},? {code})?"
    english = rf"{START}[0-9]{{1,5}}[A-Za-z]?,? {name}{WAY}{flat}{town}"
    french = (
        rf"{START}[0-9]{{1,4}}(?: bis| ter)?,? (?i:rue|avenue|boulevard|place|chemin|impasse)"
        r" (?:(?:de|du|des|la|le|les) ){0,2}(?:[ld]['’])?\p{Lu}[\w'’-]{1,20}(?: \p{Lu}[\w'’-]{1,20}){0,3}"
    )
    german = (
        r"(?<![\w])\p{Lu}[\p{L}-]{1,30}(?:straße|strasse|str\.|weg|gasse|platz|allee|ring) [0-9]{1,4} ?[a-z]?(?!\w)"
        r"(?:, [0-9]{5} \p{Lu}[\p{L}-]{1,30})?"
    )
    return [Announced("street_address", one, LIVES, bool) for one in (english, french, german)]


def _name() -> list[Span]:
    """What people say their name is, where it has capitals."""
    said = (
        r"my (?:full )?name(?: is|['’]s)|ich hei(?:ß|ss)e|mein name ist|je m['’]appelle|me llamo|mi nombre es|mi chiamo"
        "|ik heet"
    )
    part = r"\p{Lu}[\p{L}'’-]{1,24}"
    return [Span("person_name", rf"(?<!\w)(?i:{said}) (?P<name>{part}(?: {part}){{0,3}})", group="name")]


def build(options: Options) -> Spans:
    """The validator for these kinds; raises ValueError for an unknown region."""
    kinds = set(options.kinds)
    spans = [span for identifier in IDENTIFIERS if identifier.label in kinds for span in identifier.spans()]
    spans += phones.spans(options.regions) if "phone" in kinds else []
    makers = (_card, _email, _iban, _date_of_birth, _ip, _bank, _wallet, _device, _papers, _street, _name)
    spans += [span for make in makers for span in make() if span.label in kinds]
    return But(spans, options.allow) if options.allow else Spans(spans, PRECISE)


class But(Spans):
    """Spans, but for what is allowed."""

    def __init__(self, spans: Sequence[Span], allow: Sequence[str]):
        super().__init__(spans, PRECISE)
        self._allow = [_squeezed(one) for one in allow]

    def kept(self, text: str, found: list[Finding]) -> list[Finding]:
        """The findings that are not allowed."""
        return [one for one in found if not self._allowed(_squeezed(text[one.start : one.end]))]

    def _allowed(self, value: str) -> bool:
        return any(fnmatchcase(value, pattern) for pattern in self._allow)


def _squeezed(text: str) -> str:
    """The text without white space, a number without its separators."""
    if any(map(str.isalpha, text)):
        return "".join(text.split()).casefold()
    return "".join(sign for sign in text if sign.isdigit() or sign in "+*?")
