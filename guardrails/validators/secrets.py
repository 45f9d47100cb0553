"""Keys, tokens and passwords, by the shapes that their issuers give them.

A documented example (AKIAIOSFODNN7EXAMPLE) is found, since it cannot be told from a key; a placeholder
(sk-your-key-here, hf_xxxx...) is not. Check digits turn nothing down: a token with one changed letter still tells
nearly all of it.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.spans import Accept, Span, Spans

Kind = Literal[
    "anthropic_key", "api_key", "atlassian_token", "aws_access_key", "aws_secret_key", "azure_key", "basic_auth_url",
    "bearer_token", "databricks_token", "digitalocean_token", "discord_token", "discord_webhook", "docker_token",
    "github_token", "gitlab_token", "google_api_key", "google_oauth", "grafana_token", "groq_key", "huggingface_token",
    "jwt", "mailgun_key", "newel_key", "newrelic_key", "npm_token", "openai_key", "password", "perplexity_key",
    "private_key", "pypi_token", "sendgrid_key", "sentry_token", "shopify_token", "slack_token", "slack_webhook",
    "square_token", "stripe_key", "telegram_token", "twilio_key", "vault_token", "xai_key",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


class Options(BaseModel):
    """Which kinds of secrets to find."""

    model_config = ConfigDict(extra="forbid")
    kinds: list[Kind] = Field(default=list(KINDS), min_length=1, description="What to find, by label; all by default.")


PLACEHOLDER = regex.compile(
    r"(?i)x{6}|\*{3}|\.{3}|0{8}|your|placeholder|redacted|change.?me|insert|dummy|[<>{}$]"
    r"|(?:api|secret|access|auth|my)[-_](?:api[-_])?(?:key|token)"
)
STAND_IN = regex.compile(r"(?i)\W*(?:(?:my|your|db|the)[-_ ]?)?(?:pass(?:word|wd)?|pwd|secret|token|x{3,}|\*{3,})\W*")
CODE = regex.compile(r"[(\[]|^[/~.]|://")
"""Calls, indexes, paths and addresses: values that name a secret without telling it."""


def _is_random(text: str) -> bool:
    """False for placeholders: told by their words, or by having fewer than eight different characters."""
    return len(set(text)) >= 8 and not PLACEHOLDER.search(text)


def _entropy(text: str) -> float:
    """The Shannon entropy of the characters, in bits each."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _is_key(text: str) -> bool:
    """True for what looks drawn at random: letters and digits mixed, at least 3 bits a character, no code."""
    mixed = regex.search("[0-9]", text) and regex.search("[A-Za-z]", text)
    return bool(mixed) and _is_random(text) and _entropy(text) >= 3 and not CODE.search(text)


def _is_password(text: str) -> bool:
    """True for digits, or letters with a digit or sign among them; not for a word, code or a placeholder."""
    if PLACEHOLDER.search(text) or STAND_IN.fullmatch(text) or CODE.search(text):
        return False
    return text.isdigit() or bool(regex.search(r"\p{L}", text) and regex.search(r"[\d@#%^&+=]|!(?!$)", text))


def _is_login(text: str) -> bool:
    """False for a password in a URL that only stands for one (`user:password@host`)."""
    return not STAND_IN.fullmatch(text) and not PLACEHOLDER.search(text)


def _is_jwt(text: str) -> bool:
    """True where the first part decodes to a JOSE header (RFC 7515): a JSON object that names its algorithm."""
    head = text.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except ValueError:
        return False
    return isinstance(header, dict) and ("alg" in header or "enc" in header)


@dataclass(frozen=True, slots=True)
class Secret:
    """One shape of a secret; where a group is named `value`, only that part of it is secret."""

    kind: Kind
    pattern: str
    accept: Accept | None = _is_random

    def span(self) -> Span:
        """The shape as a span."""
        return Span(self.kind, self.pattern, self.accept, group="value" if "(?P<value>" in self.pattern else "")


def _token(kind: Kind, pattern: str, accept: Accept | None = _is_random) -> Secret:
    """A token that starts with its issuer's mark, not inside another word."""
    return Secret(kind, rf"(?<![A-Za-z0-9])(?:{pattern})", accept)


def _named(kind: Kind, names: str, value: str, accept: Accept) -> Secret:
    """A value that is assigned to one of `names`: `name = value`, `"name": "value"`, `name is value`."""
    assign = r"[\"'`*]{0,3}\s{0,3}(?:=>|:=|={1,2}|:|\bis\b)\s{0,3}[\"'`*]{0,3}"
    return Secret(kind, rf"(?i:(?:{names}){assign})(?P<value>{value})", accept)


TOKENS = (
    _token("anthropic_key", r"sk-ant-[\w-]{20,200}"),
    _token("atlassian_token", r"AT(?:ATT3|CTT3|BB)[\w=-]{28,250}"),
    _token("aws_access_key", "(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Za-z0-9])"),
    _token("databricks_token", "dapi[0-9a-f]{32}(?:-[0-9])?"),
    _token("digitalocean_token", "do[opr]_v1_[0-9a-f]{64}"),
    _token("discord_token", r"[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}"),
    _token("discord_webhook", r"discord(?:app)?\.com/api/(?:v[0-9]{1,2}/)?webhooks/[0-9]{17,20}/[\w-]{60,80}"),
    _token("docker_token", r"dckr_(?:pat|oat)_[\w-]{27,40}"),
    _token("github_token", r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,100}|ghs_[0-9]{1,12}_eyJ[\w.-]{36,1000}"),
    _token(
        "gitlab_token", r"gl(?:pat|dt|rt|rtr|ptt|ft|soat|cbt|agent|imt|oas|ffct|wt)-[\w-]{20,300}(?:\.[\w.]{9,20})?"
    ),
    _token("google_api_key", r"AIza[\w-]{35}|AQ\.Ab[\w-]{40,80}"),
    _token("google_oauth", r"GOCSPX-[\w-]{24,40}|ya29\.[\w-]{20,1000}|1//0[\w-]{30,200}"),
    _token("grafana_token", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}|glc_[A-Za-z0-9+/=]{32,400}"),
    _token("groq_key", "gsk_[A-Za-z0-9]{40,60}"),
    _token("huggingface_token", r"(?:hf|api_org)_[A-Za-z0-9]{30,40}"),
    _token("jwt", r"eyJ[\w-]{8,2000}\.[\w-]{8,6000}\.[\w-]{8,1000}", _is_jwt),
    _token("mailgun_key", "key-[0-9a-f]{32}"),
    _token("newel_key", r"nk-[\w-]{40}"),
    _token("newrelic_key", "NRAK-[A-Z0-9]{27}"),
    _token("npm_token", "npm_[A-Za-z0-9]{36}"),
    _token("openai_key", r"sk-(?:proj|svcacct|admin|None|or-v1)-[\w-]{20,250}|sk-[A-Za-z0-9]{20,64}"),
    _token("perplexity_key", "pplx-[A-Za-z0-9]{40,60}"),
    _token("pypi_token", r"pypi-Ag[\w-]{40,1000}"),
    _token("sendgrid_key", r"SG\.[\w-]{16,32}\.[\w-]{16,64}"),
    _token("sentry_token", r"sntry[su]_[\w+/=-]{40,300}"),
    _token("shopify_token", "shp(?:at|ca|pa|ss|tka)_[0-9a-fA-F]{32}"),
    _token("slack_token", r"(?:xoxe\.)?xox[abeoprs]-[A-Za-z0-9-]{10,250}|xapp-[0-9]-[A-Za-z0-9-]{20,200}"),
    _token("slack_webhook", r"hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/[\w/-]{20,200}"),
    _token("square_token", r"sq0(?:atp|csp)-[\w-]{22,43}|EAAA[\w-]{56,64}"),
    _token("stripe_key", "[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}|whsec_[A-Za-z0-9+/=]{24,100}"),
    _token("telegram_token", r"[0-9]{8,10}:AA[\w-]{32,34}"),
    _token("twilio_key", "SK[0-9a-f]{32}(?![A-Za-z0-9])"),
    _token("vault_token", r"hv[sbr]\.[\w-]{24,300}"),
    _token("xai_key", "xai-[A-Za-z0-9]{60,100}"),
)
ASSIGNED = (
    _named("aws_secret_key", r"secret[\s_-]?(?:access[\s_-]?)?key", "[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])", _is_random),
    _named(
        "api_key",
        r"(?:api|access|auth|client|private|secret|signing|encryption|account|master)[\s_-]?(?:key|token|secret)"
        r"|(?<!page)(?<!page[\s_-])token|secret",
        r"[^\s\"'`,;<>]{12,200}",
        _is_key,
    ),
    _named(
        "password",
        "pass(?:word|wd|phrase|code)|pwd|passwort|kennwort|contraseña|mot de passe|(?<![a-z])pass",
        r"[^\s\"'`,;<>]{5,127}[^\s\"'`,;<>.)]",
        _is_password,
    ),
    Secret("bearer_token", r"(?i:bearer\s{1,3})(?P<value>[\w.~+/=-]{20,4000})", _is_key),
)
MARKED = (
    Secret("azure_key", r"(?:AccountKey|SharedAccessKey)=(?P<value>[\w+/]{40,88}={0,2})"),
    Secret("azure_key", r"[?&]sig=(?P<value>[\w%+/-]{40,90})"),
    Secret("basic_auth_url", r"://[^\s:/@?#]{0,64}:(?P<value>[^\s/@?#]{3,128})@(?=[\w\[])", _is_login),
    Secret(
        "private_key",
        r"-----BEGIN (?:[A-Z0-9]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[\w+/=\s\\:,]|-(?!----)){0,8000}"
        r"(?:-----END [A-Z0-9 ]{1,40}-----)?",
        None,
    ),
)


def build(options: Options) -> Spans:
    """The validator for these kinds."""
    return Spans([secret.span() for secret in (*TOKENS, *ASSIGNED, *MARKED) if secret.kind in options.kinds])
