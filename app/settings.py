"""Settings: `newel.toml` (or the file in NEWEL_CONFIG) under environment variables `NEWEL_*` (`NEWEL_ENGINE__URL`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from guardrails.guard_formats import Kind


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
    """Where tickets are announced; `secret` signs each delivery (Standard Webhooks, HMAC-SHA256)."""

    model_config = ConfigDict(extra="forbid")
    url: str | None = None
    secret: SecretStr | None = None
    attempts: int = Field(default=8, ge=1)


class VaultSettings(BaseModel):
    """How values behind placeholders are encrypted and for how long they are kept.

    secret: what the keys are derived from, the service's own secret unless set. old_secrets: what earlier values were
    encrypted with. ttl: seconds after the last turn of a conversation.
    """

    model_config = ConfigDict(extra="forbid")
    secret: SecretStr | None = None
    old_secrets: list[SecretStr] = []
    ttl: float = Field(default=86_400.0, gt=0)


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
    guard_models: dict[str, GuardModelSettings] = {}
    guard_requests: int = Field(default=64, ge=1)
    guard_seconds: float = Field(default=15.0, gt=0)
    max_tokens: int = Field(default=1024, ge=1)
    first_token_timeout: float = 60.0
    idle_timeout: float = 60.0
    total_timeout: float = 600.0

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL, an SQLite file in `home` unless set."""
        return self.database or f"sqlite+aiosqlite:///{self.home / 'newel.db'}"

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
