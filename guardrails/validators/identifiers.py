"""Numbers that states give to persons, checked by their check digits (python-stdnum).

A number without a shape of its own counts only after a word that announces it ("BSN 111222333").
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import regex

from guardrails.spans import Accept, Span

GAP = " .\u00a0\u2009\u202f-"
"""What people put between groups of digits, as the inside of a character class."""
SEP = f"[{GAP}]"


class Announced(Span):
    """A span that counts only after one of `words`, with no digit and no line end between (36 characters at most).

    The words are looked for in what is already read, so nothing is held back for them.
    """

    __slots__ = ("_words", "announcing")

    def __init__(self, label: str, pattern: str, words: str, accept: Accept):
        super().__init__(label, pattern, accept)
        self.announcing = rf"(?i:(?<!\w)(?:{words})[^0-9\n]{{0,24}})"
        self._words = regex.compile(rf"{self.announcing}\Z")

    @property
    def needed(self) -> str:
        """The match after its announcement."""
        return f"{self.announcing}(?:{self.pattern})"

    def part(self, text: str, match: regex.Match[str]) -> tuple[int, int] | None:
        """The match, where it is announced and accepted."""
        first = match.start()
        return super().part(text, match) if self._words.search(text[max(0, first - 36) : first]) else None


@dataclass(frozen=True, slots=True)
class Identifier:
    """A number that a state gives to a person.

    check: the module of python-stdnum that knows its check digits, or what does instead. loose: how it may also be
    written, but only shortly after one of `words`; a shape that is too common has no other.
    """

    label: str
    check: str | Accept = ""
    pattern: str = ""
    loose: str = ""
    words: str = ""

    def spans(self) -> list[Span]:
        """The identifier as spans: bounded on both sides, announced where it must be, its check digits right."""
        start, end = r"(?<![0-9A-Za-z])(?<![0-9]\.)", r"(?![0-9A-Za-z])"
        accept = _checker(self.check)
        own = [Span(self.label, f"{start}(?:{self.pattern}){end}", accept)] if self.pattern else []
        loose = [Announced(self.label, f"{start}(?:{self.loose}){end}", self.words, accept)] if self.loose else []
        return [*own, *loose]


def _is_singapore(text: str) -> bool:
    """True for a number of Singapore's register of persons with its right last letter."""
    total = sum(int(digit) * weight for digit, weight in zip(text[1:8], (2, 7, 6, 5, 4, 3, 2), strict=True))
    letters = "JZIHGFEDCBA" if text[0] in "ST" else "XWUTRQPNMLK" if text[0] in "FG" else "XWUTRQPNJLK"
    return text[8] == letters[(total + {"T": 4, "G": 4, "M": 3}.get(text[0], 0)) % 11]


def _checker(check: str | Accept) -> Accept:
    """The `is_valid` of a module of python-stdnum, asked without the separators that it does not know itself."""
    if not isinstance(check, str) or not check:
        return check or bool
    is_valid: Accept = import_module(f"stdnum.{check}").is_valid
    return lambda text: is_valid("".join(c for c in text if c.isalnum() or c in "-+"))


MBI = "[AC-HJKMNP-RT-Y][0-9AC-HJKMNP-RT-Y]"
"""A letter, and a letter or digit, of a Medicare number: without those that look like digits."""

IDENTIFIERS = (
    Identifier("au_tfn", "au.tfn", loose=rf"[0-9]{{3}}{SEP}?[0-9]{{3}}{SEP}?[0-9]{{2,3}}", words="tfn|tax file"),
    Identifier("be_national_number", "be.nn", r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}",
               r"[0-9]{6}[ -]?[0-9]{3}[ .]?[0-9]{2}", "rijksregister|registre national"),
    Identifier("br_cpf", "br.cpf", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", "[0-9]{9}-?[0-9]{2}", "cpf"),
    Identifier("ca_sin", "ca.sin", loose=rf"[0-9]{{3}}{SEP}?[0-9]{{3}}{SEP}?[0-9]{{3}}",
               words="sin|nas|social insurance"),
    Identifier("ch_ahv", "ch.ssn", r"756[. ]?[0-9]{4}[. ]?[0-9]{4}[. ]?[0-9]{2}"),
    Identifier("cn_ric", "cn.ric", r"[1-9][0-9]{5}(?:19|20)[0-9]{9}[0-9Xx]"),
    Identifier("de_tax_id", "de.idnr", loose=r"[1-9][0-9] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}",
               words=r"steuer[- ]?id\w{0,20}|steueridentifikation\w{0,10}|idnr|tax id\w{0,20}"),
    Identifier("dk_cpr", "dk.cpr", loose=r"[0-3][0-9][01][0-9]{3}[- ]?[0-9]{4}", words="cpr|personnummer"),
    Identifier("es_dni", "es.dni", r"[0-9]{8}[ -]?[A-Za-z]"),
    Identifier("fi_hetu", "fi.hetu", r"[0-3][0-9][01][0-9]{3}[-+A-FU-Y][0-9]{3}[0-9A-FHJ-NPR-Y]"),
    Identifier("fr_nir", "fr.nir", rf"[12]{SEP}?[0-9]{{2}}{SEP}?[0-9]{{2}}{SEP}?(?:[0-9]{{2}}|2[ABab]){SEP}?[0-9]{{3}}"
                                   rf"{SEP}?[0-9]{{3}}{SEP}?[0-9]{{2}}"),
    Identifier("ie_pps", "ie.pps", loose="[0-9]{7}[A-Wa-w][A-IWa-iw]?", words=r"pps\w{0,2}"),
    Identifier("in_aadhaar", "in_.aadhaar", loose=rf"[2-9][0-9]{{3}}{SEP}?[0-9]{{4}}{SEP}?[0-9]{{4}}",
               words="aa?dha?ar|uidai"),
    Identifier("kr_rrn", "kr.rrn", "[0-9]{2}[01][0-9][0-3][0-9]-[0-9]{7}"),
    Identifier("nl_bsn", "nl.bsn", loose=rf"[0-9]{{4}}{SEP}?[0-9]{{2}}{SEP}?[0-9]{{3}}",
               words=r"bsn|burgerservice\w{0,8}|sofi\w{0,8}"),
    Identifier("no_fodselsnummer", "no.fodselsnummer", "[0-7][0-9][0-9]{4} ?[0-9]{5}"),
    Identifier("pl_pesel", "pl.pesel", loose="[0-9]{11}", words="pesel"),
    Identifier("pt_nif", "pt.nif", loose=rf"[1235689][0-9]{{2}}{SEP}?[0-9]{{3}}{SEP}?[0-9]{{3}}",
               words="nif|contribuinte"),
    Identifier("se_personnummer", "se.personnummer", "(?:19|20)?[0-9]{2}[01][0-9][0-3][0-9][-+][0-9]{4}"),
    Identifier("tr_kimlik", "tr.tckimlik", loose="[1-9][0-9]{10}", words=r"kimlik|tckn|t\.?c\.?"),
    Identifier("uk_nhs", "gb.nhs", loose=rf"[0-9]{{3}}{SEP}?[0-9]{{3}}{SEP}?[0-9]{{4}}", words="nhs"),
    Identifier("us_itin", "us.itin", "9[0-9]{2}-[5-9][0-9]-[0-9]{4}"),
    Identifier("us_ssn", "us.ssn", "[0-8][0-9]{2}-[0-9]{2}-[0-9]{4}",
               r"[0-8][0-9]{8}|[0-8][0-9]{2}[ .][0-9]{2}[ .][0-9]{4}", r"ssn|s\.s\.n\.?|social security|social"),
    Identifier("za_id", "za.idnr", loose="[0-9]{2}[01][0-9][0-3][0-9] ?[0-9]{4} ?[01][89] ?[0-9]",
               words=r"(?:south african|sa|rsa) id\w{0,10}|id number"),
    Identifier("es_nie", "es.nie", r"[XYZxyz][ -]?[0-9]{7}[ -]?[A-Za-z]"),
    Identifier("in_pan", "in_.pan", "[A-Z]{3}[ABCFGHJLPT][A-Z][0-9]{4}[A-Z]"),
    Identifier("it_codice_fiscale", "it.codicefiscale",
               "(?i:[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z])"),
    Identifier("mx_curp", "mx.curp", "(?i:[A-Z]{4}[0-9]{6}[HMX][A-Z]{5}[0-9A-Z][0-9])"),
    Identifier("uk_nino", "", "(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{2} ?[0-9]{2} ?"
                              "[0-9]{2} ?[A-D]"),
    Identifier("ar_cuil", "ar.cuit", "2[0347]-[0-9]{8}-[0-9]", "2[0347][0-9]{9}", "cui[lt]"),
    Identifier("at_svnr", "at.vnr", loose="[0-9]{4} ?[0-9]{6}",
               words=r"svnr|sv-nr\.?|(?:sozial)?versicherungsn\w{1,8}"),
    Identifier("bg_egn", "bg.egn", loose="[0-9]{10}", words="egn|егн"),
    Identifier("cl_rut", "cl.rut", r"[0-9]{1,2}\.[0-9]{3}\.[0-9]{3}-[0-9Kk]", "[0-9]{7,8}-?[0-9Kk]", "ru[tn]"),
    Identifier("cz_rodne_cislo", "cz.rc", "[0-9]{6}/[0-9]{4}", "[0-9]{6}/?[0-9]{3,4}",
               r"rodn[ée]\w{0,2} [čc][íi]sl\w{1,2}|r\.? ?č\."),
    Identifier("do_cedula", "do.cedula", loose="[0-9]{3}-?[0-9]{7}-?[0-9]", words="c[ée]dula"),
    Identifier("ec_cedula", "ec.ci", loose="[0-9]{9}-?[0-9]", words="c[ée]dula"),
    Identifier("ee_isikukood", "ee.ik", loose="[1-8][0-9]{10}", words="isikukood"),
    Identifier("gb_utr", "gb.utr", loose="[0-9]{5} ?[0-9]{5}", words="utr|unique taxpayer"),
    Identifier("gr_amka", "gr.amka", loose="[0-3][0-9][01][0-9]{8}", words="amka|αμκα"),
    Identifier("hr_oib", "hr.oib", loose="[0-9]{11}", words="oib"),
    Identifier("id_nik", "id.nik", loose="[1-9][0-9]{15}", words="nik|e?-?ktp"),
    Identifier("il_id", "il.idnr", loose="[0-9]{7,8}-?[0-9]",
               words=r"(?:teudat |mispar )?zehut|israeli id\w{0,8}|תעודת זהות|ת\.ז\.?"),
    Identifier("is_kennitala", "is_.kennitala", loose="[0-9]{6}-?[0-9]{4}", words="kennitala|kt"),
    Identifier("jp_my_number", "jp.in_", loose="[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}",
               words="my ?number|マイナンバー|個人番号"),
    Identifier("lt_asmens_kodas", "lt.asmens", loose="[1-9][0-9]{10}", words=r"asmens kod\w{1,3}"),
    Identifier("lv_personas_kods", "lv.pvn", loose="[0-3][0-9]{5}-?[0-9]{5}", words=r"personas kod\w{1,3}"),
    Identifier("my_nric", "my.nric", loose="[0-9]{6}-?[0-9]{2}-?[0-9]{4}",
               words=r"nric|mykad|(?:my|his|her) ic|ic n\w{1,5}"),
    Identifier("nz_ird", "nz.ird", loose="[0-9]{2,3}[ -]?[0-9]{3}[ -]?[0-9]{3}", words="ird"),
    Identifier("pk_cnic", "pk.cnic", "[1-7][0-9]{4}-[0-9]{7}-[0-9]", "[1-7][0-9]{12}", "cnic"),
    Identifier("ro_cnp", "ro.cnp", loose="[1-9][0-9]{12}", words="cnp|cod numeric personal"),
    Identifier("ru_inn", "ru.inn", loose="[0-9]{12}", words="inn|инн"),
    Identifier("sg_nric", _is_singapore, "[STFGM][0-9]{7}[A-Z]"),
    Identifier("si_emso", "si.emso", loose="[0-3][0-9][01][0-9]{10}", words="em[šs]o|jmbg"),
    Identifier("th_id", "th.pin", "[1-8]-[0-9]{4}-[0-9]{5}-[0-9]{2}-[0-9]", "[1-8][0-9]{12}",
               "thai(?:land)? (?:national )?id|เลขประจำตัวประชาชน|บัตรประชาชน"),
    Identifier("ua_rntrc", "ua.rntrc", loose="[0-9]{10}", words="rntrc|рнокпп|іпн"),
    Identifier("us_medicare", "", loose=f"[1-9]{MBI}[0-9]-?{MBI}[0-9]-?[AC-HJKMNP-RT-Y]{{2}}[0-9]{{2}}",
               words="medicare|mbi"),
    Identifier("in_voter_id", "in_.epic", loose="[A-Z]{3}[0-9]{7}", words="voter|epic"),
    Identifier("mx_rfc", "mx.rfc", loose="[A-ZÑ&]{4} ?[0-9]{6} ?[0-9A-Z]{3}", words="rfc"),
)  # fmt: skip
