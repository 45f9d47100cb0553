"""Personal data: addresses, numbers and identifiers that belong to one person, checked by their check digits.

Identifiers without a shape of their own count only after a word that announces them ("BSN 111222333").
"""

from __future__ import annotations

import ipaddress
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from stdnum import iban, luhn

from guardrails.spans import Span, Spans
from guardrails.validators import phones
from guardrails.validators.identifiers import IDENTIFIERS, SEP

Kind = Literal[
    "email", "phone", "card", "iban", "date_of_birth", "ip",
    "au_tfn", "be_national_number", "br_cpf", "ca_sin", "ch_ahv", "cn_ric", "de_tax_id", "dk_cpr", "es_dni", "es_nie",
    "fi_hetu", "fr_nir", "ie_pps", "in_aadhaar", "in_pan", "it_codice_fiscale", "kr_rrn", "mx_curp", "nl_bsn",
    "no_fodselsnummer", "pl_pesel", "pt_nif", "se_personnummer", "tr_kimlik", "uk_nhs", "uk_nino", "us_itin", "us_ssn",
    "za_id",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


class Options(BaseModel):
    """Which kinds of personal data to find."""

    model_config = ConfigDict(extra="forbid")
    kinds: list[Kind] = Field(
        default=[kind for kind in KINDS if kind != "ip"],
        min_length=1,
        description="What to find, by label. `ip` is off by default: four-part version numbers look like addresses.",
    )
    regions: list[str] = Field(
        default=["US", "GB"],
        description="Countries (ISO 3166, two letters) whose phone numbers are known without the `+` and country code.",
    )


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


def build(options: Options) -> Spans:
    """The validator for these kinds; raises ValueError for an unknown region."""
    kinds = set(options.kinds)
    spans = [span for identifier in IDENTIFIERS if identifier.label in kinds for span in identifier.spans()]
    spans += phones.spans(options.regions) if "phone" in kinds else []
    makers = (("card", _card), ("email", _email), ("iban", _iban), ("date_of_birth", _date_of_birth), ("ip", _ip))
    return Spans([*spans, *(span for kind, make in makers if kind in kinds for span in make())])
