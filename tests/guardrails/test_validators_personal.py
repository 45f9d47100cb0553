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
    ("CUIL 20-05536168-2", [("ar_cuil", "20-05536168-2")]),
    ("SVNR 1237 010180", [("at_svnr", "1237 010180")]),
    ("ЕГН 8032056031", [("bg_egn", "8032056031")]),
    ("76.086.428-5", [("cl_rut", "76.086.428-5")]),
    ("RUT: 12531909-2", [("cl_rut", "12531909-2")]),
    ("710319/2745", [("cz_rodne_cislo", "710319/2745")]),
    ("mi cédula es 00113918205", [("do_cedula", "00113918205")]),
    ("cédula 171430710-3", [("ec_cedula", "171430710-3")]),
    ("isikukood 36805280109", [("ee_isikukood", "36805280109")]),
    ("my UTR is 19558 39661", [("gb_utr", "19558 39661")]),
    ("ΑΜΚΑ: 01013099997", [("gr_amka", "01013099997")]),
    ("OIB 33392005961", [("hr_oib", "33392005961")]),
    ("NIK: 3171011708450001", [("id_nik", "3171011708450001")]),
    ("teudat zehut 3933742-3", [("il_id", "3933742-3")]),
    ("voter id WKH1186253", [("in_voter_id", "WKH1186253")]),
    ("kennitala 120174-3399", [("is_kennitala", "120174-3399")]),
    ("マイナンバー 6214 9832 0257", [("jp_my_number", "6214 9832 0257")]),
    ("asmens kodas 33309240064", [("lt_asmens_kodas", "33309240064")]),
    ("personas kods 161175-19997", [("lv_personas_kods", "161175-19997")]),
    ("MyKad 770305-02-1234", [("my_nric", "770305-02-1234")]),
    ("RFC GODE 561231 GR8", [("mx_rfc", "GODE 561231 GR8")]),
    ("IRD number 49-091-850", [("nz_ird", "49-091-850")]),
    ("34201-0891231-8", [("pk_cnic", "34201-0891231-8")]),
    ("CNP 1630615123457", [("ro_cnp", "1630615123457")]),
    ("ИНН 123456789047", [("ru_inn", "123456789047")]),
    ("S1234567D and G1234567X", [("sg_nric", "S1234567D"), ("sg_nric", "G1234567X")]),
    ("EMŠO 0101006500006", [("si_emso", "0101006500006")]),
    ("3-1006-00445-63-5", [("th_id", "3-1006-00445-63-5")]),
    ("РНОКПП 1759013776", [("ua_rntrc", "1759013776")]),
    ("Medicare number 1EG4-TE5-MK73", [("us_medicare", "1EG4-TE5-MK73")]),
    ("my bank account is 12345678", [("bank_account", "12345678")]),
    ("account number: 000123456789", [("bank_account", "000123456789")]),
    ("routing number 111000025", [("us_routing", "111000025")]),
    ("sort code 12-34-56", [("uk_sort_code", "12-34-56")]),
    ("IMEI 35-209900-176148-1", [("imei", "35-209900-176148-1")]),
    ("eth0 aa:bb:cc:00:11:22", [("mac_address", "aa:bb:cc:00:11:22")]),
    ("pay 1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2", [("crypto_wallet", "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2")]),
    (
        "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq!",
        [("crypto_wallet", "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq")],
    ),
    (
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        [("crypto_wallet", "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed")],
    ),
    (
        "my wallet: 0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaed",
        [("crypto_wallet", "0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaed")],
    ),
    ("Passport no. X1234567", [("passport", "X1234567")]),
    ("Reisepass: C01X00T47", [("passport", "C01X00T47")]),
    ("driver's license D1234567", [("driving_licence", "D1234567")]),
    ("driving licence MORGA657054SM9IJ", [("driving_licence", "MORGA657054SM9IJ")]),
    ("I live at 221B Baker Street, London", [("street_address", "221B Baker Street")]),
    (
        "Ship it to 1600 Amber Hill Rd, Apt 4, Springfield, IL 62704 please",
        [("street_address", "1600 Amber Hill Rd, Apt 4, Springfield, IL 62704")],
    ),
    ("Ich wohne in der Hauptstraße 12a, 10115 Berlin.", [("street_address", "Hauptstraße 12a, 10115 Berlin")]),
    ("J'habite 12 bis, rue de la Paix", [("street_address", "12 bis, rue de la Paix")]),
    ("My name is Anna Maria O'Neil and I", [("person_name", "Anna Maria O'Neil")]),
    ("Ich heiße Jürgen", [("person_name", "Jürgen")]),
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
    "CUIL 20-05536168-3, 76.086.428-6, 710319/2746, S1234567E, 3-1006-00445-63-6",
    "00113918205 and 171430710-3 and 36805280109 and 33392005961 without a word for them",
    "oib 33392005962, CNP 1630615123458, ИНН 123456789048, EMŠO 0101006500007, РНОКПП 1759013770",
    "isikukood 36805280108, asmens kodas 33309240164, AMKA 01013099999, NIK 3171011713450001",
    "SVNR 2237 010180, EGN 8032056032, IRD 49-091-851, kennitala 450401-3151, MyKad 771305-02-1234",
    "34201-0891231-X, voter id WKH1186254, Medicare pays 80 % of 1,200 dollars",
    "On my account there are 12 orders; account 12345678 is not announced as one",
    "The account number field has 8 digits",
    "routing number 111000026, the route 111000025",
    "Sort by code 12-34-56-78",
    "IMEI 35-209900-176148-2, model 352099001761481",
    "00:00:00:00:00:00 and 12:34:56",
    "1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN3 and bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdp",
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1Beaed and 0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaed",
    "Your passport expires in 2031, bring the passport to room 12",
    "A driving licence costs 43 pounds; licence plate B-AB 1234",
    "We met at 221B Baker Street. Turn left on Main Street after 3 Miles",
    "I live at the end of the road and have lived there for 12 years",
    "My address book has 300 names; live 24 hours a day",
    "Meine Adresse hat sich 2023 geändert",
    "my name is on the list, my name is unusual",
    "Her name is Anna",
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
    usual = personal.build(personal.Options())
    assert found("host 192.168.10.255, aa:bb:cc:00:11:22, my name is Anna", usual) == []


@pytest.mark.parametrize(("regions", "expected"), [(["US"], []), (["GB"], [("phone", "020 7946 0958")])])
def test_national_numbers_are_those_of_the_regions(regions, expected):
    assert found("020 7946 0958", personal.build(personal.Options(regions=regions))) == expected


def test_regions_may_be_the_european_union():
    numbers = ["Bel 06 12 34 56 78", "Rufen Sie 030 901820 an"]
    union = personal.build(personal.Options(kinds=["phone"], regions=["EU"]))
    assert [found(number, union) for number in numbers] == [[("phone", "06 12 34 56 78")], [("phone", "030 901820")]]


def test_an_unknown_region_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match="UK is not a country code; write two capitals such as US"):
        personal.build(personal.Options(regions=["US", "UK"]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Write to help@acme.com or HELP@Acme.com.", []),
        ("Write to help@acme.com or ann@example.com.", ["ann@example.com"]),
        ("Write to help@acme.community.", ["help@acme.community"]),
        ("Call +1 800 555 0199 now.", []),
        ("Call +1 (800) 555-0199 now.", []),
        ("Call +1 212 555 0199 now.", ["+1 212 555 0199"]),
    ],
)
async def test_ones_own_addresses_and_numbers_may_be_said(text: str, found: list[str]) -> None:
    validator = personal.build(personal.Options(kinds=["email", "phone"], allow=["*@acme.com", "+1 800 555 0199"]))
    assert [text[one.start : one.end] for one in await validator.find(text, Context())] == found
    (reading,) = validator.readings()
    read = [one for end in range(len(text) + 1) for one in reading.read(text[:end], end == len(text))[0]]
    assert [text[one.start : one.end] for one in read] == found
