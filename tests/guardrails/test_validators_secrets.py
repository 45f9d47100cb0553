import base64
import json

import pytest

from guardrails.types import Context, Finding
from guardrails.validators import secrets

ALL = secrets.build(secrets.Options())

# Tokens are put together here, so that scanners of this repository do not take them for real ones.
MIXED = "aB3dE5fG7hJ9kL1mN0pQ2rS4tU6vW8xY" * 4
UPPER = "Q7RZ3KD5WMX4TB6N" * 4
HEX = "4b825dc642cb6eb9a060e54bf8d69288" * 4
JWT = (
    ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890", "name": "Jane"})
    )
    + f".{MIXED[:43]}"
)
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{MIXED[:64]}\n{MIXED[:20]}==\n-----END RSA PRIVATE KEY-----"

TOKENS = [
    ("anthropic_key", f"sk-ant-api03-{MIXED[:93]}AA"),
    ("atlassian_token", f"ATATT3xFfGF0{MIXED}"),
    ("aws_access_key", f"AKIA{UPPER[:16]}"),
    ("aws_access_key", "AKIAIOSFODNN7" + "EXAMPLE"),
    ("databricks_token", f"dapi{HEX[:32]}"),
    ("digitalocean_token", f"dop_v1_{HEX[:64]}"),
    ("discord_token", f"MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.{MIXED[:27]}"),
    ("discord_webhook", f"discord.com/api/webhooks/123456789012345678/{MIXED[:68]}"),
    ("docker_token", f"dckr_pat_{MIXED[:27]}"),
    ("github_token", f"ghp_{MIXED[:36]}"),
    ("github_token", f"github_pat_{MIXED[:22]}_{MIXED[:59]}"),
    ("gitlab_token", f"glpat-{MIXED[:20]}"),
    ("google_api_key", f"AIza{MIXED[:35]}"),
    ("google_oauth", f"GOCSPX-{MIXED[:28]}"),
    ("grafana_token", f"glsa_{MIXED[:32]}_{HEX[:8]}"),
    ("groq_key", f"gsk_{MIXED[:52]}"),
    ("huggingface_token", f"hf_{MIXED[:34]}"),
    ("jwt", JWT),
    ("mailgun_key", f"key-{HEX[:32]}"),
    ("newel_key", f"nk-{MIXED[:38]}_-"),
    ("newrelic_key", f"NRAK-{UPPER[:27]}"),
    ("npm_token", f"npm_{MIXED[:36]}"),
    ("openai_key", f"sk-proj-{MIXED[:74]}T3BlbkFJ{MIXED[:40]}"),
    ("openai_key", f"sk-{MIXED[:48]}"),
    ("perplexity_key", f"pplx-{MIXED[:48]}"),
    ("private_key", PEM),
    ("pypi_token", f"pypi-AgEIcHlwaS5vcmc{MIXED[:80]}"),
    ("sendgrid_key", f"SG.{MIXED[:22]}.{MIXED[:43]}"),
    ("sentry_token", f"sntrys_eyJ{MIXED[:60]}"),
    ("shopify_token", f"shpat_{HEX[:32]}"),
    ("slack_token", f"xoxb-123456789012-1234567890123-{MIXED[:24]}"),
    ("slack_webhook", f"hooks.slack.com/services/T01234567/B01234567/{MIXED[:24]}"),
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
    return [(one.label, text[one.start : one.end]) for one in sorted(findings, key=lambda one: one.start)]


@pytest.mark.parametrize(("text", "expected"), HITS)
def test_a_secret_is_found_with_its_exact_characters(text, expected):
    assert found(text) == expected


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
