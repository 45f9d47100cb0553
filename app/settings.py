"""Settings: `newel.toml` (or the file in NEWEL_CONFIG) under environment variables `NEWEL_*` (`NEWEL_ENGINE__URL`)."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from app.records import KeyScope, Retention
from guardrails.guard_formats import Kind

TokenAlgorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"
]
"""What a token may be signed with: never `none`, and never a secret that both sides share."""


class EngineSettings(BaseModel):
    """Where the model runs: an OpenAI-compatible `url`, or a process that newel starts and watches."""

    model_config = ConfigDict(extra="forbid")
    url: str | None = None
    api_key: SecretStr | None = None
    python: str | None = None
    kind: Literal["auto", "vllm", "cpu"] = "auto"
    model: str = "smollm2-135m-instruct"
    args: list[str] = []
    without: list[str] = []
    start_timeout: float = 600.0


class GuardModelSettings(BaseModel):
    """A guard model that rules can ask by the table's name: where it is served, and the family that it belongs to."""

    model_config = ConfigDict(extra="forbid")
    url: str
    model: str
    kind: Kind
    api_key: SecretStr | None = None
    timeout: float = Field(default=5.0, gt=0)
    concurrency: int = Field(default=16, ge=1)


class WebhookSettings(BaseModel):
    """Where tickets are announced; `secret` signs each delivery (Standard Webhooks, HMAC-SHA256).

    allow: what may be called although it is internal or speaks plain http, as `host:port` or as a CIDR.
    """

    model_config = ConfigDict(extra="forbid")
    url: str | None = None
    secret: SecretStr | None = None
    attempts: int = Field(default=8, ge=1)
    allow: list[str] = []


class OidcSettings(BaseModel):
    """Whose tokens open the door, beside API keys; off without an `issuer`.

    tenants, scopes: pairs (value of the claim, what it stands for), of which the first that matches counts; "*" matches
    every token. leeway, refresh: seconds. subject: whether the person of a turn is the token's `sub`.
    """

    model_config = ConfigDict(extra="forbid")
    issuer: str = ""
    audience: list[str] = []
    jwks_url: str = ""
    algorithms: list[TokenAlgorithm] = Field(default=["RS256", "ES256", "EdDSA"], min_length=1)
    tenant_claim: str = "tenant"
    tenants: list[tuple[str, str]] = []
    scope_claim: str = "scope"
    scopes: list[tuple[str, KeyScope]] = [("*", "client")]
    subject: bool = False
    leeway: int = Field(default=30, ge=0, le=300)
    refresh: float = Field(default=300.0, ge=10)


class AuthSettings(BaseModel):
    """Who is let in: how many failures an address or the start of a key has, and whose X-Forwarded-For is believed.

    failures: at once; failures_per_minute: after that.
    """

    model_config = ConfigDict(extra="forbid")
    failures: int = Field(default=20, ge=1)
    failures_per_minute: float = Field(default=10.0, gt=0)
    trusted_proxies: list[IPvAnyNetwork] = []
    oidc: OidcSettings = OidcSettings()


class AdminSettings(BaseModel):
    """Where the operators' routes and the metrics listen: 1000 above the service's `port` unless set; 0 is nowhere."""

    model_config = ConfigDict(extra="forbid")
    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=0, le=65535)


class VaultSettings(BaseModel):
    """How values behind placeholders are encrypted and for how long they are kept.

    secret: what the keys are derived from, the service's own secret unless set. old_secrets: what earlier values were
    encrypted with. ttl: seconds after the last turn of a conversation.
    """

    model_config = ConfigDict(extra="forbid")
    secret: SecretStr | None = None
    old_secrets: list[SecretStr] = []
    ttl: float = Field(default=86_400.0, gt=0)


class RetentionSettings(BaseModel):
    """For how many days texts are kept; 0 is for ever.

    A turn goes with all that hangs on it, once its ticket is no longer open; deliveries: those sent or given up.
    """

    model_config = ConfigDict(extra="forbid")
    turns_days: float = Field(default=0.0, ge=0)
    withheld_days: float = Field(default=0.0, ge=0)
    feedback_days: float = Field(default=0.0, ge=0)
    deliveries_days: float = Field(default=0.0, ge=0)

    @property
    def periods(self) -> Retention:
        """The same as spans of time."""
        days = (self.turns_days, self.withheld_days, self.feedback_days, self.deliveries_days)
        return Retention(*(timedelta(days=number) if number else None for number in days))


class PoolEngineSettings(BaseModel):
    """One engine of a pool: its URL up to /v1, the key it wants, and how much of the load it takes beside others."""

    model_config = ConfigDict(extra="forbid")
    url: str
    api_key: SecretStr | None = None
    weight: float = Field(default=1.0, gt=0)


class PoolSettings(BaseModel):
    """Engines that serve the same models and share their load.

    without: parameters that they must not be sent. in_flight: requests at once for an engine of weight 1; it and the
    time-outs are the gateway's own unless set. retries: engines that are asked after the first one failed. probe_every,
    trial_every: seconds between two looks at an engine, and between two completions of one token while nobody asks it
    (0: none). listed: whether an engine must list a model to be asked for it.
    """

    model_config = ConfigDict(extra="forbid")
    engines: dict[str, PoolEngineSettings] = Field(min_length=1)
    without: list[str] = []
    in_flight: int | None = Field(default=None, ge=1)
    first_token_timeout: float | None = Field(default=None, gt=0)
    idle_timeout: float | None = Field(default=None, gt=0)
    total_timeout: float | None = Field(default=None, gt=0)
    retries: int = Field(default=2, ge=0)
    probe_every: float = Field(default=5.0, gt=0)
    trial_every: float = Field(default=60.0, ge=0)
    listed: bool = True


class ShareSettings(BaseModel):
    """A second release of a model and the share of its conversations that it gets; pool: the model's own unless set."""

    model_config = ConfigDict(extra="forbid")
    pool: str = ""
    model: str = ""
    share: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.share and not self.model:
            raise ValueError("a canary or a shadow with a share needs the `model` that its engines know it by")
        return self


class ModelSettings(BaseModel):
    """A model as clients ask for it: the pool that serves it, and its name there.

    fallback: models or pools that are asked, in this order, when it cannot be had. Prices: per million tokens.
    """

    model_config = ConfigDict(extra="forbid")
    pool: str
    model: str
    canary: ShareSettings = ShareSettings()
    shadow: ShareSettings = ShareSettings()
    fallback: list[str] = []
    prompt_price: float = Field(default=0.0, ge=0)
    completion_price: float = Field(default=0.0, ge=0)


class AdmissionSettings(BaseModel):
    """The queue before each pool: requests at once for an engine, how many may wait, and for how long (seconds).

    queue: of all classes; batch_queue, shadow_queue: of these at most. reserved: the share of the room that only
    interactive requests may take. batch_every: one of so many places that come free goes to a batch request (0: only
    when no interactive one waits).
    """

    model_config = ConfigDict(extra="forbid")
    in_flight: int = Field(default=256, ge=1)
    queue: int = Field(default=1024, ge=0)
    batch_queue: int = Field(default=512, ge=0)
    shadow_queue: int = Field(default=32, ge=0)
    wait: float = Field(default=30.0, gt=0)
    reserved: float = Field(default=0.1, ge=0, lt=1)
    batch_every: int = Field(default=0, ge=0)


SUPERVISED = "engine"
"""The pool of the one engine under [engine]."""


class LimitSettings(BaseModel):
    """Where rates and budgets of keys are counted, and what is done while that place cannot be reached.

    backend: auto is Redis where `redis_url` is set, else a PostgreSQL in `database`, else this process. share: the part
    of each limit that this replica grants by itself with when_limits_fail = "local". timeout: seconds for one answer.
    """

    model_config = ConfigDict(extra="forbid")
    backend: Literal["auto", "memory", "redis", "postgresql"] = "auto"
    redis_url: SecretStr | None = None
    when_limits_fail: Literal["refuse", "local"] = "local"
    share: float = Field(default=0.25, gt=0, le=1)
    timeout: float = Field(default=0.5, gt=0)


class IdempotencySettings(BaseModel):
    """For how many seconds an Idempotency-Key is known, and how many a second request with it waits for the first."""

    model_config = ConfigDict(extra="forbid")
    ttl: float = Field(default=86_400.0, gt=0)
    wait: float = Field(default=10.0, ge=0)


class TracingSettings(BaseModel):
    """Where spans are sent: the whole URL of an OTLP/HTTP collector's traces; off without an `endpoint`.

    sample: the share of traces that are recorded where the client brings none; where it does, it decides.
    provider: what the spans name as `gen_ai.provider.name`. timeout: seconds for one batch.
    """

    model_config = ConfigDict(extra="forbid")
    endpoint: str = ""
    sample: float = Field(default=1.0, ge=0, le=1)
    provider: str = "openai"
    timeout: float = Field(default=10.0, gt=0)


class Settings(BaseSettings):
    """Everything an operator can set; `deploy/newel.toml` is the annotated example."""

    model_config = SettingsConfigDict(env_prefix="NEWEL_", env_nested_delimiter="__", extra="forbid")
    home: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "newel")
    host: str = "127.0.0.1"
    port: int = 8080
    database: str = ""
    secret: SecretStr | None = None
    policies: Path | None = None
    default_policy: str = "base"
    body_limit: int = Field(default=1_048_576, ge=1024)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    engine: EngineSettings = EngineSettings()
    webhook: WebhookSettings = WebhookSettings()
    vault: VaultSettings = VaultSettings()
    retention: RetentionSettings = RetentionSettings()
    limits: LimitSettings = LimitSettings()
    idempotency: IdempotencySettings = IdempotencySettings()
    auth: AuthSettings = AuthSettings()
    admin: AdminSettings = AdminSettings()
    tracing: TracingSettings = TracingSettings()
    pools: dict[str, PoolSettings] = {}
    models: dict[str, ModelSettings] = {}
    admission: AdmissionSettings = AdmissionSettings()
    guard_models: dict[str, GuardModelSettings] = {}
    guard_requests: int = Field(default=64, ge=1)
    guard_seconds: float = Field(default=15.0, gt=0)
    max_tokens: int = Field(default=1024, ge=1)
    first_token_timeout: float = 60.0
    idle_timeout: float = 60.0
    keepalive: float = Field(default=10.0, gt=0)
    log_delay: float = Field(default=0.03, ge=0, le=5)
    total_timeout: float = 600.0

    @model_validator(mode="after")
    def _models_are_served(self) -> Self:
        """Every pool and fallback that a model names is there."""
        if SUPERVISED in self.pools:
            raise ValueError(f"pools.{SUPERVISED}: this name stands for the engine under [engine]; choose another")
        if self.pools and not self.models:
            raise ValueError("[pools] without [models]: say which models they serve, [models.NAME]")
        pools = {*self.pools, SUPERVISED}
        for name, model in self.models.items():
            wanted = {f"models.{name}.pool": model.pool}
            wanted |= {f"models.{name}.canary.pool": model.canary.pool} if model.canary.pool else {}
            wanted |= {f"models.{name}.shadow.pool": model.shadow.pool} if model.shadow.pool else {}
            for place, pool in wanted.items():
                if pool not in pools:
                    raise ValueError(f"{place}: there is no pool {pool!r}; there are: {', '.join(sorted(pools))}")
            if unknown := [one for one in model.fallback if one not in pools | self.models.keys()]:
                raise ValueError(f"models.{name}.fallback: there is no model or pool {unknown[0]!r}")
        return self

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL, an SQLite file in `home` unless set."""
        return self.database or f"sqlite+aiosqlite:///{self.home / 'newel.db'}"

    @property
    def admin_port(self) -> int:
        """Where the operators' routes listen; 0 when they are not served."""
        if self.admin.port is not None:
            return self.admin.port
        return self.port + 1000 if self.port + 1000 <= 65535 else self.port - 1000

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the file."""
        path = Path(os.environ.get("NEWEL_CONFIG", "newel.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)
