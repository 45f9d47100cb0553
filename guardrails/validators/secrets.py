"""Keys, tokens and passwords, by the shapes that their issuers give them.

A documented example (AKIAIOSFODNN7EXAMPLE) is found, since it cannot be told from a key; a placeholder
(sk-your-key-here, hf_xxxx...) is not. Wrong check digits turn a marked token down only to a score of 0.6: with one
changed letter it still tells nearly all of itself.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.spans import PRECISE, Accept, Span, Spans
from guardrails.validators.checksums import BASE58, base58, crc62, is_bech32

Kind = Literal[
    "age_key", "airtable_token", "anthropic_key", "api_key", "atlassian_token", "aws_access_key", "aws_bedrock_key",
    "aws_secret_key", "azure_ad_secret", "azure_devops_token", "azure_key", "basic_auth_url", "bearer_token",
    "buildkite_token", "circleci_token", "cloudflare_token", "databricks_token", "datadog_key", "digitalocean_token",
    "discord_token", "discord_webhook", "docker_token", "doppler_token", "dynatrace_token", "figma_token",
    "flyio_token", "gcp_service_account", "github_token", "gitlab_token", "google_api_key", "google_oauth",
    "grafana_token", "groq_key", "heroku_key", "huggingface_token", "jwt", "langsmith_key", "linear_key",
    "mailchimp_key", "mailgun_key", "mapbox_token", "netlify_token", "newel_key", "newrelic_key", "notion_token",
    "npm_token", "nuget_key", "nvidia_key", "okta_token", "onepassword_token", "openai_key", "pagerduty_key",
    "password", "perplexity_key", "planetscale_token", "posthog_key", "postman_key", "private_key", "pulumi_token",
    "pypi_token", "replicate_token", "resend_key", "rubygems_key", "sendgrid_key", "sentry_token", "shopify_token",
    "slack_token", "slack_webhook", "sonar_token", "square_token", "stripe_key", "supabase_key", "tailscale_key",
    "teams_webhook", "telegram_token", "terraform_token", "twilio_key", "vault_token", "vercel_token", "wif_key",
    "xai_key",
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


def _ends_with_crc(text: str) -> bool:
    """True for 30 characters and the CRC of them after a mark of four, and for tokens of any other length."""
    return len(text) != 40 or crc62(text[4:34]) == text[34:]


def _is_aws(text: str) -> bool:
    """True where the number of an account is in the key, as in all since 2019; older ones have none."""
    number = int.from_bytes(base64.b32decode(text[4:])[:6]) >> 7 & (1 << 40) - 1
    return text[4] in "IJ" or number < 10**12


def _is_macaroon(text: str) -> bool:
    """True where the token decodes to a macaroon of PyPI."""
    try:
        return base64.urlsafe_b64decode(text[5:25])[3:].startswith((b"pypi.org", b"test.pypi"))
    except binascii.Error:
        return False


class Checked(Span):
    """A span for tokens with check digits: 1 where `check` says that they are right, else 0.6."""

    __slots__ = ("check",)

    def __init__(self, label: str, pattern: str, accept: Accept | None, check: Accept):
        super().__init__(label, pattern, accept)
        self.check = check

    def rated(self, text: str) -> float:
        """1, or 0.6 where the check digits are wrong."""
        return 1.0 if self.check(text) else 0.6


@dataclass(frozen=True, slots=True)
class Secret:
    """One shape of a secret; where a group is named `value`, only that part of it is secret."""

    kind: Kind
    pattern: str
    accept: Accept | None = _is_random
    check: Accept | None = None

    def span(self) -> Span:
        """The shape as a span."""
        if self.check:
            return Checked(self.kind, self.pattern, self.accept, self.check)
        return Span(self.kind, self.pattern, self.accept, group="value" if "(?P<value>" in self.pattern else "")


def _token(kind: Kind, pattern: str, accept: Accept | None = _is_random, check: Accept | None = None) -> Secret:
    """A token that starts with its issuer's mark, not inside another word."""
    return Secret(kind, rf"(?<![A-Za-z0-9])(?:{pattern})", accept, check)


def _named(kind: Kind, names: str, value: str, accept: Accept) -> Secret:
    """A value that is assigned to one of `names`: `name = value`, `"name": "value"`, `name is value`."""
    assign = r"[\"'`*]{0,3}\s{0,3}(?:=>|:=|={1,2}|:|\bis\b)\s{0,3}[\"'`*]{0,3}"
    return Secret(kind, rf"(?i:(?:{names}){assign})(?P<value>{value})", accept)


TOKENS = (
    _token("anthropic_key", r"sk-ant-[\w-]{20,200}"),
    _token("atlassian_token", r"AT(?:ATT3|CTT3|BB)[\w=-]{28,250}"),
    _token("aws_access_key", "(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Za-z0-9])", check=_is_aws),
    _token("databricks_token", "dapi[0-9a-f]{32}(?:-[0-9])?"),
    _token("digitalocean_token", "do[opr]_v1_[0-9a-f]{64}"),
    _token("discord_token", r"[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}"),
    _token("discord_webhook", r"discord(?:app)?\.com/api/(?:v[0-9]{1,2}/)?webhooks/[0-9]{17,20}/[\w-]{60,80}"),
    _token("docker_token", r"dckr_(?:pat|oat)_[\w-]{27,40}"),
    _token(
        "github_token",
        r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,100}|ghs_[0-9]{1,12}_eyJ[\w.-]{36,1000}",
        check=_ends_with_crc,
    ),
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
    _token("npm_token", "npm_[A-Za-z0-9]{36}", check=_ends_with_crc),
    _token("openai_key", r"sk-(?:proj|svcacct|admin|None|or-v1)-[\w-]{20,250}|sk-[A-Za-z0-9]{20,64}"),
    _token("perplexity_key", "pplx-[A-Za-z0-9]{40,60}"),
    _token("pypi_token", r"pypi-Ag[\w-]{40,1000}", check=_is_macaroon),
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
    _token("age_key", "AGE-SECRET-KEY-1[QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L]{58}", None, is_bech32),
    _token("airtable_token", r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}"),
    _token("aws_bedrock_key", "ABSK[A-Za-z0-9+/]{109,269}={0,2}"),
    _token("azure_ad_secret", r"[\w~.]{3}[0-9]Q~[\w~.-]{31,34}(?![\w~-])"),
    _token("azure_devops_token", "[A-Za-z0-9]{76}AZDO[A-Za-z0-9]{4}(?![A-Za-z0-9])"),
    _token("azure_key", "[A-Za-z0-9]{52}JQQJ99[A-Za-z0-9]{18}[A-Za-z0-9+/]{4,8}(?![A-Za-z0-9])"),
    _token("buildkite_token", "bk(?:ua|aj|ct)_[0-9a-f]{40}"),
    _token("circleci_token", "CCI(?:PAT|PRJ)_[A-Za-z0-9]{22}_[0-9a-f]{40}"),
    _token("cloudflare_token", r"v1\.0-[0-9a-f]{24}-[0-9a-f]{140,150}"),
    _token("doppler_token", r"dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[a-z0-9_-]{2,35}\.)?[A-Za-z0-9]{40,44}"),
    _token("dynatrace_token", r"dt0[a-z][0-9]{2}\.[A-Z0-9]{24}\.[A-Z0-9]{64}"),
    _token("figma_token", r"fig[dopru]_[\w-]{40,60}"),
    _token("flyio_token", r"fo1_[\w-]{43}|fm[12][ar]?_[A-Za-z0-9+/=,_-]{100,2000}"),
    _token("heroku_key", r"HRKU-AA[\w-]{58}"),
    _token("langsmith_key", "lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}"),
    _token("linear_key", "lin_(?:api|oauth)_[A-Za-z0-9]{40,64}"),
    _token("mailchimp_key", "[0-9a-f]{32}-us[0-9]{1,2}(?![0-9A-Za-z])"),
    _token("mapbox_token", r"sk\.eyJ[\w-]{40,200}\.[\w-]{20,40}"),
    _token("netlify_token", r"nfp_\w{36}"),
    _token("notion_token", "ntn_[0-9]{11}[A-Za-z0-9]{35}|secret_[A-Za-z0-9]{43}(?![A-Za-z0-9])"),
    _token("nuget_key", "oy2[a-z0-9]{43}(?![A-Za-z0-9])"),
    _token("nvidia_key", r"nvapi-[\w-]{60,70}"),
    _token("onepassword_token", r"ops_eyJ[A-Za-z0-9+/_-]{250,2000}={0,3}|A3(?:-[A-Z0-9]{5,6}){6}(?![A-Z0-9-])"),
    _token("planetscale_token", r"pscale_(?:tkn|oauth|pw)_[\w.=-]{32,64}"),
    _token("posthog_key", "ph[xs]_[A-Za-z0-9]{40,60}"),
    _token("postman_key", "PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
    _token("pulumi_token", "pul-[0-9a-f]{40}"),
    _token("replicate_token", "r8_[A-Za-z0-9]{37}"),
    _token("resend_key", "re_[A-Za-z0-9]{8}_[A-Za-z0-9]{24}"),
    _token("rubygems_key", "rubygems_[0-9a-f]{48}"),
    _token("sonar_token", "sq[pua]_[0-9a-f]{40}"),
    _token("supabase_key", r"sb_secret_[\w-]{31,40}|sbp_[0-9a-f]{40}"),
    _token("tailscale_key", r"tskey-(?:api|auth|client|scim|webhook)-\w{10,20}-\w{20,40}"),
    _token(
        "teams_webhook", r"webhook\.office\.com/webhookb2/[0-9a-f@-]{73}/IncomingWebhook/[0-9a-f]{32}/[0-9a-f-]{36}"
    ),
    _token("terraform_token", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,70}"),
    _token("vercel_token", "vc[pikar]_[A-Za-z0-9]{24,60}|vercel_blob_rw_[A-Za-z0-9]{16}_[A-Za-z0-9]{30,40}"),
    _token("wif_key", f"[5KL][{BASE58}]{{50,51}}(?![A-Za-z0-9])", lambda text: bool(base58(text))),
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
    _named("cloudflare_token", r"(?:cloudflare|cf)[\s_-]?api[\s_-]?(?:token|key)", r"[\w-]{37,40}(?![\w-])", _is_key),
    _named(
        "datadog_key", r"(?:dd|datadog)[\s_-]?ap(?:i|p|plication)[\s_-]?key", "[0-9a-f]{32}(?:[0-9a-f]{8})?", _is_key
    ),
    _named(
        "heroku_key", r"heroku[\s_-]?api[\s_-]?(?:key|token)", "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", _is_key
    ),
    _named("okta_token", r"okta[\s_-]?(?:api[\s_-]?)?token", r"00[\w-]{40}(?![\w-])", _is_key),
    _named("pagerduty_key", r"pager[\s_-]?duty[\s_-]?(?:api[\s_-]?)?(?:key|token)", r"[\w+-]{20}(?![\w+-])", _is_key),
    Secret("okta_token", r"(?i:ssws\s{1,3})(?P<value>00[\w-]{40})", _is_key),
    Secret("bearer_token", r"(?i:bearer\s{1,3})(?P<value>[\w.~+/=-]{20,4000})", _is_key),
)
MARKED = (
    Secret("azure_key", r"(?:AccountKey|SharedAccessKey)=(?P<value>[\w+/]{40,88}={0,2})"),
    Secret("azure_key", r"(?<![\w+/])(?P<value>[\w+/]{76}(?:\+ASt|ACDb)[\w+/]{5}[AQgw]==)"),
    Secret("gcp_service_account", r"\"private_key_id\"\s{0,3}:\s{0,3}\"(?P<value>[0-9a-f]{40})\""),
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
    return Spans([secret.span() for secret in (*TOKENS, *ASSIGNED, *MARKED) if secret.kind in options.kinds], PRECISE)
