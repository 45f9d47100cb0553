import base64
import hashlib
import json

import pytest

from guardrails.types import Context, Finding
from guardrails.validators import secrets
from guardrails.validators.checksums import BASE58, BECH32, base58, crc62, is_bech32, is_eip55, keccak256

ALL = secrets.build(secrets.Options())

# Tokens are put together here, so that scanners of this repository do not take them for real ones.
MIXED = "aB3dE5fG7hJ9kL1mN0pQ2rS4tU6vW8xY" * 4
UPPER = "Q7RZ3KD5WMX4TB6N" * 4
HEX = "4b825dc642cb6eb9a060e54bf8d69288" * 4
UUID = "5f0c9d3e-8a71-4b26-9c4d-e2718f6ab035"


def wif() -> str:
    """A private key of Bitcoin with its right check digits."""
    body = b"\x80" + hashlib.sha256(MIXED.encode()).digest() + b"\x01"
    number, out = int.from_bytes(body + hashlib.sha256(hashlib.sha256(body).digest()).digest()[:4]), ""
    while number:
        number, digit = divmod(number, 58)
        out = BASE58[digit] + out
    return out


def age() -> str:
    """An age key with its right check characters, found by trying."""
    body = "AGE-SECRET-KEY-1" + (BECH32 * 2)[5:57].upper()
    values = [ord(sign) >> 5 for sign in "age-secret-key-"] + [0] + [ord(sign) & 31 for sign in "age-secret-key-"]
    check = 1
    for value in values + [BECH32.index(sign) for sign in body[16:].lower()] + [0] * 6:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for i, one in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= one if top >> i & 1 else 0
    return body + "".join(BECH32[(check ^ 1) >> 5 * (5 - i) & 31] for i in range(6)).upper()


def crc(mark: str) -> str:
    """A token of GitHub or npm with its right check digits."""
    return f"{mark}{MIXED[:30]}{crc62(MIXED[:30])}"


JWT = (
    ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890", "name": "Jane"})
    )
    + f".{MIXED[:43]}"
)
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{MIXED[:64]}\n{MIXED[:20]}==\n-----END RSA PRIVATE KEY-----"

TOKENS = [
    ("age_key", age()),
    ("airtable_token", f"pat{MIXED[:14]}.{HEX[:64]}"),
    ("anthropic_key", f"sk-ant-api03-{MIXED[:93]}AA"),
    ("atlassian_token", f"ATATT3xFfGF0{MIXED}"),
    ("aws_access_key", f"AKIA{UPPER[:16]}"),
    ("aws_access_key", "AKIAIOSFODNN7" + "EXAMPLE"),
    ("aws_bedrock_key", f"ABSK{MIXED[:120]}="),
    ("azure_ad_secret", f"aB38Q~{MIXED[:34]}"),
    ("azure_devops_token", f"{MIXED[:76]}AZDO{MIXED[:4]}"),
    ("azure_key", f"{MIXED[:52]}JQQJ99{MIXED[:18]}{MIXED[:8]}"),
    ("azure_key", f"{MIXED[:76]}+ASt{MIXED[:5]}Q=="),
    ("buildkite_token", f"bkua_{HEX[:40]}"),
    ("circleci_token", f"CCIPAT_{MIXED[:22]}_{HEX[:40]}"),
    ("cloudflare_token", f"v1.0-{HEX[:24]}-{(HEX * 2)[:146]}"),
    ("databricks_token", f"dapi{HEX[:32]}"),
    ("digitalocean_token", f"dop_v1_{HEX[:64]}"),
    ("discord_token", f"MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.{MIXED[:27]}"),
    ("discord_webhook", f"discord.com/api/webhooks/123456789012345678/{MIXED[:68]}"),
    ("docker_token", f"dckr_pat_{MIXED[:27]}"),
    ("doppler_token", f"dp.st.prd.{MIXED[:40]}"),
    ("dynatrace_token", f"dt0c01.{UPPER[:24]}.{UPPER[:64]}"),
    ("figma_token", f"figd_{MIXED[:40]}"),
    ("flyio_token", f"fo1_{MIXED[:43]}"),
    ("github_token", crc("ghp_")),
    ("github_token", crc("ghs_")),
    ("github_token", f"github_pat_{MIXED[:22]}_{MIXED[:59]}"),
    ("gitlab_token", f"glpat-{MIXED[:20]}"),
    ("google_api_key", f"AIza{MIXED[:35]}"),
    ("google_oauth", f"GOCSPX-{MIXED[:28]}"),
    ("grafana_token", f"glsa_{MIXED[:32]}_{HEX[:8]}"),
    ("heroku_key", f"HRKU-AA{MIXED[:58]}"),
    ("groq_key", f"gsk_{MIXED[:52]}"),
    ("huggingface_token", f"hf_{MIXED[:34]}"),
    ("jwt", JWT),
    ("langsmith_key", f"lsv2_pt_{HEX[:32]}_{HEX[:10]}"),
    ("linear_key", f"lin_api_{MIXED[:40]}"),
    ("mailchimp_key", f"{HEX[:32]}-us14"),
    ("mapbox_token", f"sk.eyJ{MIXED[:60]}.{MIXED[:22]}"),
    ("mailgun_key", f"key-{HEX[:32]}"),
    ("newel_key", f"nk-{MIXED[:38]}_-"),
    ("newrelic_key", f"NRAK-{UPPER[:27]}"),
    ("netlify_token", f"nfp_{MIXED[:36]}"),
    ("notion_token", f"ntn_12345678901{MIXED[:35]}"),
    ("npm_token", crc("npm_")),
    ("nuget_key", f"oy2{UPPER.lower()[:43]}"),
    ("nvidia_key", f"nvapi-{MIXED[:64]}"),
    ("onepassword_token", "A3-" + "-".join(UPPER[i : i + size] for i, size in enumerate((6, 6, 5, 5, 5, 5)))),
    ("openai_key", f"sk-proj-{MIXED[:74]}T3BlbkFJ{MIXED[:40]}"),
    ("openai_key", f"sk-{MIXED[:48]}"),
    ("perplexity_key", f"pplx-{MIXED[:48]}"),
    ("private_key", PEM),
    ("planetscale_token", f"pscale_tkn_{MIXED[:43]}"),
    ("posthog_key", f"phx_{MIXED[:43]}"),
    ("postman_key", f"PMAK-{HEX[:24]}-{HEX[:34]}"),
    ("pulumi_token", f"pul-{HEX[:40]}"),
    ("replicate_token", f"r8_{MIXED[:37]}"),
    ("resend_key", f"re_{MIXED[:8]}_{MIXED[:24]}"),
    ("rubygems_key", f"rubygems_{HEX[:48]}"),
    ("pypi_token", f"pypi-AgEIcHlwaS5vcmc{MIXED[:80]}"),
    ("sendgrid_key", f"SG.{MIXED[:22]}.{MIXED[:43]}"),
    ("sentry_token", f"sntrys_eyJ{MIXED[:60]}"),
    ("shopify_token", f"shpat_{HEX[:32]}"),
    ("slack_token", f"xoxb-123456789012-1234567890123-{MIXED[:24]}"),
    ("slack_webhook", f"hooks.slack.com/services/T01234567/B01234567/{MIXED[:24]}"),
    ("sonar_token", f"squ_{HEX[:40]}"),
    ("supabase_key", f"sb_secret_{MIXED[:31]}"),
    ("supabase_key", f"sbp_{HEX[:40]}"),
    ("tailscale_key", f"tskey-auth-{MIXED[:17]}-{MIXED[:32]}"),
    ("teams_webhook", f"webhook.office.com/webhookb2/{UUID}@{UUID}/IncomingWebhook/{HEX[:32]}/{UUID}"),
    ("terraform_token", f"{MIXED[:14]}.atlasv1.{MIXED[:67]}"),
    ("vercel_token", f"vcp_{MIXED[:56]}"),
    ("wif_key", wif()),
    ("square_token", f"sq0atp-{MIXED[:22]}"),
    ("stripe_key", f"sk_live_{MIXED[:24]}"),
    ("telegram_token", f"110201543:AA{MIXED[:33]}"),
    ("twilio_key", f"SK{HEX[:32]}"),
    ("vault_token", f"hvs.{MIXED[:90]}"),
    ("xai_key", f"xai-{MIXED[:80]}"),
]

# The text before a secret, the secret, the text after it.
ASSIGNED = [
    ("password", "my password is ", "hunter2", "."),
    ("password", 'DB_PASSWORD="', "s3cr3t!Pa55", '"'),
    ("password", "Passwort: ", "Sommer2024!", ""),
    ("password", "pwd = ", "493021", ""),
    ("password", "userPassword: '", "P@ss-word", "',"),
    ("api_key", "api_key: ", MIXED[:24], ""),
    ("api_key", '"client_secret": "', HEX[:32], '"'),
    ("bearer_token", "Authorization: Bearer ", MIXED[:40], ""),
    ("azure_key", "https://acme.example/c?sv=2024&sig=", f"{MIXED[:40]}%3D", "&se=1"),
    ("basic_auth_url", "postgres://app:", "s3cretPw", "@db.example:5432/app"),
]
HITS = [(f"it is {token} !", [(kind, token)]) for kind, token in TOKENS] + [
    (before + secret + after, [(kind, secret)]) for kind, before, secret, after in ASSIGNED
]
HITS += [
    (f"{name}: {value}", [(kind, value), *also])
    for kind, name, value, also in (
        ("cloudflare_token", "CLOUDFLARE_API_TOKEN", MIXED[:40], [("api_key", MIXED[:40])]),
        ("datadog_key", "DD_API_KEY", HEX[:32], [("api_key", HEX[:32])]),
        ("datadog_key", "datadog app key", HEX[:40], []),
        ("heroku_key", "HEROKU_API_KEY", UUID, [("api_key", UUID)]),
        ("okta_token", "okta token", f"00{MIXED[:40]}", [("api_key", f"00{MIXED[:40]}")]),
        ("pagerduty_key", "PagerDuty key", MIXED[:20], []),
    )
]
HITS += [
    (f"Authorization: SSWS 00{MIXED[:40]}", [("okta_token", f"00{MIXED[:40]}")]),
    (f'"private_key_id": "{HEX[:40]}"', [("gcp_service_account", HEX[:40])]),
]
TWICE = f"{MIXED[:20]}/{MIXED[:19]}"
HITS += [
    # Named for what it is, and as the value of a key.
    (f"aws_secret_access_key = {TWICE}", [("aws_secret_key", TWICE), ("api_key", TWICE)]),
    (f"SharedAccessKey={MIXED[:43]}=;", [("api_key", f"{MIXED[:43]}="), ("azure_key", f"{MIXED[:43]}=")]),
    (f"api_key: sk-{MIXED[:48]}", [("openai_key", f"sk-{MIXED[:48]}"), ("api_key", f"sk-{MIXED[:48]}")]),
]

NEAR_MISSES = [
    "sk-your-key-here, sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxx and sk-00000000000000000000000000000000",
    "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "ghp_short and ghp_" + "a" * 36,
    "api_key = YOUR_API_KEY_GOES_HERE_1",
    'api_key = os.environ["API_KEY_2"]',
    "token = get_token(user1)",
    "next_page_token: CAEQAxoOUFQ6Q0FFUUF4b08",
    "The password is incorrect. Your password: required, at least 8 characters",
    "password is case-sensitive",
    "password=password, pwd: ********, password: <your password>",
    "password: /etc/app/password2.txt",
    "postgres://user:password@localhost/db and https://user:<token>@host",
    "https://example.com:8080/path@2x",
    "risk-" + MIXED[:30],
    "max_tokens: 4096, token count: 1200, tokens=512",
    "eyJub3QiOiJhIGp3dCJ9.eyJzdWIiOiIxIn0.abcdefghij",
    "commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    "550e8400-e29b-41d4-a716-446655440000",
    "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----",
    "pk_live_" + MIXED[:24],
    "the bearer of this letter, bearer bonds",
    "AccountKey=short",
    "secret: never give up, always smile",
    "AKIA is a prefix, AKIAshort too",
]


def found(text: str, validator=ALL) -> list[tuple[str, str]]:
    findings = [finding for reading in validator.readings() for finding in reading.read(text, True)[0]]
    return sorted(((one.label, text[one.start : one.end]) for one in findings), key=lambda two: text.find(two[1]))


@pytest.mark.parametrize(("text", "expected"), HITS)
def test_a_secret_is_found_with_its_exact_characters(text, expected):
    assert sorted(found(text)) == sorted(expected)


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_placeholders_and_look_alikes_are_left_alone(text):
    assert found(text) == []


def test_every_kind_has_a_hit():
    assert {label for _, expected in HITS for label, _ in expected} == set(secrets.KINDS)


def test_a_private_key_is_found_up_to_where_it_was_cut_off():
    cut = PEM[: PEM.index("-----END")]
    assert found(f"{cut}. Thanks!") == [("private_key", cut)]


async def test_only_the_kinds_asked_for_are_found():
    only = secrets.build(secrets.Options(kinds=["newel_key"]))
    key = f"nk-{MIXED[:40]}"
    assert await only.find(f"{key} password is hunter2", Context()) == [Finding("newel_key", 0, len(key))]


@pytest.mark.parametrize(("kind", "token"), TOKENS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(TOKENS)])
def test_neither_the_start_of_a_token_nor_a_placeholder_of_its_shape_is_one(kind, token):
    blank = "".join("x" if sign.isalnum() and i > 7 else sign for i, sign in enumerate(token))
    assert kind not in {label for label, _ in found(f"it is {blank} !") + found(f"it is {token[:14]} !")}


@pytest.mark.parametrize("token", [crc("ghp_"), crc("npm_"), age(), f"pypi-AgEIcHlwaS5vcmc{MIXED[:80]}"])
def test_a_token_with_a_changed_letter_scores_lower_but_is_found(token):
    (right,) = ALL.among(token, ALL.prefilter.candidates(token))
    place = 14 if token.startswith("pypi") else 20
    changed = token[:place] + ("A" if token[place] != "A" else "Q") + token[place + 1 :]
    (wrong,) = ALL.among(changed, ALL.prefilter.candidates(changed))
    assert (right.score, wrong.score) == (1.0, 0.6)


def test_a_private_key_of_bitcoin_needs_its_check_digits():
    key = wif()
    assert base58(key) and not base58(key[:-1] + ("a" if key[-1] != "a" else "b")) and not base58("0")
    assert found(f"it is {key[:-1]}{'a' if key[-1] != 'a' else 'b'}") == []


def test_check_digits_are_those_of_the_standards():
    assert keccak256(b"abc").hex() == "4e03657aea45a94fc7d47ba826c8d667c0d1e6e33a64a036ec44f58fa12d6c45"
    assert is_eip55("0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed")  # the first example of EIP-55
    assert not is_eip55("0x5aAeb6053F3E94C9b9A09f33669435E7Ef1Beaed")
    assert is_bech32("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0")  # an example of BIP 350
    assert not is_bech32("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj2")
