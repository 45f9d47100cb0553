import pytest

from guardrails.types import Context, Finding
from guardrails.validators import personal

EVERYTHING = personal.build(personal.Options(kinds=list(personal.KINDS), regions=["US", "GB", "DE", "FR"]))

# text, then what is found in it: (label, the very characters)
HITS = [
    ("Write to jane.doe+hr@mail.example.co.uk, please.", [("email", "jane.doe+hr@mail.example.co.uk")]),
    ("<müller@bücher.example>", [("email", "müller@bücher.example")]),
    ("..jane@example.com-foo", [("email", "jane@example.com")]),
    ("jane [at] example [dot] com", [("email", "jane [at] example [dot] com")]),
    ("a@example.com,b@example.org", [("email", "a@example.com"), ("email", "b@example.org")]),
    ("call 415-555-2671 12:30", [("phone", "415-555-2671")]),
    ("(415) 555-2671 or 415.555.2672", [("phone", "(415) 555-2671"), ("phone", "415.555.2672")]),
    ("+1 415 555 2671", [("phone", "+1 415 555 2671")]),
    ("tel:+14155552671", [("phone", "+14155552671")]),
    ("Ring 020 7946 0958 (London)", [("phone", "020 7946 0958")]),
    ("+44 (0)20 7946 0958", [("phone", "+44 (0)20 7946 0958")]),
    ("+49 30 901820", [("phone", "+49 30 901820")]),
    ("Bel 06 12 34 56 78", [("phone", "06 12 34 56 78")]),
    ("my phone number is 4155552671", [("phone", "4155552671")]),
    ("phone 4155552671 12", [("phone", "4155552671")]),
    ("On 2024-01-05 call 415-555-2671", [("phone", "415-555-2671")]),
    ("4111 1111 1111 1111 12/27", [("card", "4111 1111 1111 1111")]),
    ("4111-1111-1111-1111 123", [("card", "4111-1111-1111-1111")]),
    ("PAN4111111111111111.", [("card", "4111111111111111")]),
    ("Pay 1234 4111 1111 1111 1111", [("card", "4111 1111 1111 1111")]),
    ("3782 822463 10005", [("card", "3782 822463 10005")]),
    ("5555555555554444", [("card", "5555555555554444")]),
    ("4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", [("card", "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1")]),
    ("DE89 3704 0044 0532 0130 00 and more", [("iban", "DE89 3704 0044 0532 0130 00")]),
    ("de89370400440532013000", [("iban", "de89370400440532013000")]),
    ("ES91 2100 0418 4502 0005 1332 BANK", [("iban", "ES91 2100 0418 4502 0005 1332")]),
    ("IBAN_GB82WEST12345698765432", [("iban", "GB82WEST12345698765432")]),
    ("DOB: 1985-07-30", [("date_of_birth", "1985-07-30")]),
    ("She was born on 4 July 1985.", [("date_of_birth", "4 July 1985")]),
    ("Date of birth is March 3rd, 1990", [("date_of_birth", "March 3rd, 1990")]),
    ("geboren am 04.07.1985", [("date_of_birth", "04.07.1985")]),
    ("host 192.168.10.255 is up", [("ip", "192.168.10.255")]),
    ("ping 2001:db8::8a2e:370:7334 now", [("ip", "2001:db8::8a2e:370:7334")]),
    ("TFN 123 456 782", [("au_tfn", "123 456 782")]),
    ("85.07.30-033.28", [("be_national_number", "85.07.30-033.28")]),
    ("390.533.447-05", [("br_cpf", "390.533.447-05")]),
    ("CPF 39053344705", [("br_cpf", "39053344705")]),
    ("SIN: 123-456-782", [("ca_sin", "123-456-782")]),
    ("756.9217.0769.85", [("ch_ahv", "756.9217.0769.85")]),
    ("360426199101010071", [("cn_ric", "360426199101010071")]),
    ("Steuer-ID 36 574 261 809", [("de_tax_id", "36 574 261 809")]),
    ("CPR 211062-5629", [("dk_cpr", "211062-5629")]),
    ("DNI 54362315-K", [("es_dni", "54362315-K")]),
    ("X2482300W", [("es_nie", "X2482300W")]),
    ("131052-308T", [("fi_hetu", "131052-308T")]),
    ("2 95 10 99 126 111 93", [("fr_nir", "2 95 10 99 126 111 93")]),
    ("PPSN 6433435F", [("ie_pps", "6433435F")]),
    ("my Aadhaar is 2341 2341 2346", [("in_aadhaar", "2341 2341 2346")]),
    ("PAN ACUPA7085R", [("in_pan", "ACUPA7085R")]),
    ("RCCMNL83S18D969H", [("it_codice_fiscale", "RCCMNL83S18D969H")]),
    ("971013-9019902", [("kr_rrn", "971013-9019902")]),
    ("BOXW310820HNERXN09", [("mx_curp", "BOXW310820HNERXN09")]),
    ("BSN: 111222333", [("nl_bsn", "111222333")]),
    ("151086 95088", [("no_fodselsnummer", "151086 95088")]),
    ("PESEL 44051401359", [("pl_pesel", "44051401359")]),
    ("NIF 501 964 843", [("pt_nif", "501 964 843")]),
    ("880320-0016", [("se_personnummer", "880320-0016")]),
    ("T.C. kimlik no 17291716060", [("tr_kimlik", "17291716060")]),
    ("NHS number 943 476 5870", [("uk_nhs", "943 476 5870"), ("phone", "943 476 5870")]),
    ("NINO AB 12 34 56 C", [("uk_nino", "AB 12 34 56 C")]),
    ("912-90-3456", [("us_itin", "912-90-3456")]),
    ("SSN 536-90-4399", [("us_ssn", "536-90-4399")]),
    ("her social security number: 536904399", [("us_ssn", "536904399")]),
    ("ID number 7503305044089", [("za_id", "7503305044089")]),
]

NEAR_MISSES = [
    "Follow @jane on the site, or user@localhost.",
    "git clone git@github.com:acme/tools.git",
    "lodash@4.17.21 and icon@2x.png",
    "Order 4111111111111112 shipped",
    "Order 4155552671 shipped, ticket 555-2671",
    "tracking 1234 5678 9012 3456",
    "0.4111111111111111",
    "0000 0000 0000 0000",
    "Version 1.2.3.4567 of 2024-01-05 10:30:22",
    "Between 01.02.2023 and 03.04.2024, 12/31/2024",
    "The price is 1 234 567,89 or 1,234,567.89 or $4,155,552,671",
    "DE89 3704 0044 0532 0130 01",
    "Model DE12 ABCD is out",
    "Born to run, birthday cake, the dob field",
    "Founded on 4 July 1985",
    "SSN 000-12-3456, 666-12-3456, 123-00-4567, 987-65-4321",
    "part 123456789 and build 536904399",
    "111222333 is a nice number",
    "case 44051401359",
    "54362315-A",
    "X2482300A",
    "RCCMNL83S18D969X",
    "BG 12 34 56 C",
    "999.999.999.999 and 12:30:45 and std::vector and face::off",
    "3.14159265358979323846",
    "Room 415-555",
    "1/2/3 4/5/6",
]


def found(text: str, validator=EVERYTHING) -> list[tuple[str, str]]:
    findings = [finding for reading in validator.readings() for finding in reading.read(text, True)[0]]
    return [(one.label, text[one.start : one.end]) for one in sorted(findings, key=lambda one: one.start)]


@pytest.mark.parametrize(("text", "expected"), HITS, ids=[text for text, _ in HITS])
def test_personal_data_is_found_with_its_exact_characters(text, expected):
    assert found(text) == expected


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_what_only_looks_like_personal_data_is_left_alone(text):
    assert found(text) == []


def test_every_kind_has_a_hit():
    assert {label for _, expected in HITS for label, _ in expected} == set(personal.KINDS)


async def test_only_the_kinds_asked_for_are_found():
    only = personal.build(personal.Options(kinds=["email"]))
    assert await only.find("jane@example.com, SSN 536-90-4399", Context()) == [Finding("email", 0, 16)]


def test_addresses_of_machines_are_off_unless_asked_for():
    assert found("host 192.168.10.255", personal.build(personal.Options())) == []


@pytest.mark.parametrize(("regions", "expected"), [(["US"], []), (["GB"], [("phone", "020 7946 0958")])])
def test_national_numbers_are_those_of_the_regions(regions, expected):
    assert found("020 7946 0958", personal.build(personal.Options(regions=regions))) == expected


def test_an_unknown_region_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match="UK is not a country code; write two capitals such as US"):
        personal.build(personal.Options(regions=["US", "UK"]))
