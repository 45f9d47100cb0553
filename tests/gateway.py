"""A whole gateway for tests: real uvicorn on loopback, a fake engine behind it, a small policy, keys, and clients.

async with FakeUpstream() as upstream, running(tmp_path, upstream) as gateway:
    await gateway.ask("Hello")
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from pydantic import SecretStr

from app.admin import create_admin_app
from app.main import create_app
from app.records import KeyScope, Tenant, Turn, WhenStoreFails
from app.service import Service
from app.settings import EngineSettings, Settings, WebhookSettings
from tests.fakes import FakeUpstream, serve

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SALARY, CRISIS = "I can't share what others earn. Please ask HR.", "A person will write back to you here."
BOMB, LEGAL = "I will not explain that.", "Consult a legal professional."
POLICY = f'''
name = "office"
persona = "You help people at work."

[[input]]
name = "salary"
validator = "patterns"
patterns = ['salary of \\w{{1,20}}']
action = "refuse"
reply = "{SALARY}"

[[input]]
name = "crisis"
validator = "patterns"
patterns = ['harass\\w{{0,6}}']
action = "escalate"
route = "people"
reply = "{CRISIS}"

[[input]]
name = "emergency"
validator = "patterns"
patterns = ['hurt myself']
action = "escalate"
route = "on-call"
reply = "Help is on its way."

[[input]]
name = "cards"
validator = "personal"
kinds = ["card"]
action = "redact"

[[input]]
name = "legal"
validator = "patterns"
patterns = ['overtime']
action = "append"
reply = "{LEGAL}"

[[output]]
name = "mail"
validator = "personal"
kinds = ["email"]
action = "redact"

[[output]]
name = "bomb"
validator = "patterns"
patterns = ['mix the \\w{{1,20}} powder']
action = "refuse"
reply = "{BOMB}"

[routes.people]
queue = "hr"
priority = "high"
due = "4h"

[routes.on-call]
queue = "on-call"
priority = "urgent"
due = "15m"

[[example]]
ask = "How do I ask for a raise?"
expect = "allow"

[[example]]
ask = "What is the salary of Jane?"
expect = "refuse"
rule = "salary"

[[example]]
ask = "I am being harassed."
expect = "escalate"
rule = "crisis"

[[example]]
ask = "I want to hurt myself."
expect = "escalate"
rule = "emergency"

[[example]]
ask = "My card is 4111 1111 1111 1111."
expect = "redact"
rule = "cards"
becomes = "My card is [CARD]."

[[example]]
ask = "Is unpaid overtime legal?"
expect = "append"
rule = "legal"

[[example]]
answer = "Gladly."
expect = "allow"

[[example]]
answer = "Write to jane@example.com."
expect = "redact"
rule = "mail"

[[example]]
answer = "Then mix the grey powder with oil."
expect = "refuse"
rule = "bomb"
'''


OPEN = """
name = "open"
persona = "You talk."
"""
"""A policy without rules."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway: where it is, its parts, a client's key and an operator's.

    operators is where the admin port listens; `raw` and `json` find by the path which of the two it must be.
    """

    base: str
    operators: str
    service: Service
    http: aiohttp.ClientSession
    upstream: FakeUpstream
    key: str
    admin: str
    model: str

    def sdk(self, key: str = "", **options: Any) -> AsyncOpenAI:
        """A real OpenAI client that does not retry, since a retry hides what it retries."""
        return AsyncOpenAI(base_url=f"{self.base}/v1", api_key=key or self.key, **({"max_retries": 0} | options))

    def body(self, *said: str, **more: Any) -> dict[str, Any]:
        """A chat request in which the user and the assistant say these things in turn."""
        messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
        return {"model": self.model, "messages": messages} | more

    async def ask(
        self, *said: str, key: str = "", headers: dict[str, str] | None = None, **more: Any
    ) -> ChatCompletion:
        """The reply to such a request, not streamed."""
        async with self.sdk(key) as client:
            reply: ChatCompletion = await client.chat.completions.create(
                **self.body(*said, **more), extra_headers=headers or {}
            )
        return reply

    async def raw(
        self, method: str, path: str, *, key: str | None = None, headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in small letters, body) of any request; `key=""` sends none."""
        key = self.key if key is None else key
        sent = ({"authorization": f"Bearer {key}"} if key else {}) | (headers or {})
        base = self.operators if path.startswith(("/admin", "/metrics")) else self.base
        async with self.http.request(method, f"{base}{path}", headers=sent, **more) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.read()

    async def json(self, method: str, path: str, **more: Any) -> tuple[int, dict[str, Any]]:
        """(status, JSON body) of any request."""
        status, _, body = await self.raw(method, path, **more)
        parsed: dict[str, Any] = orjson.loads(body)
        return status, parsed

    async def turn(self, id: str, tenant: str = "default") -> Turn:
        """The turn as it is on record, once it is finished."""
        return await until(lambda: self._finished(id, tenant))

    async def _finished(self, id: str, tenant: str) -> Turn | None:
        turn = await self.service.store.turn(id, tenant)
        return turn if turn and turn.ended else None

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 when it was never counted."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    async def tenant(
        self, name: str, policy: str = "office", scope: KeyScope = "client", when: WhenStoreFails = "refuse"
    ) -> str:
        """The key of a tenant that is made, or changed."""
        await self.service.store.put_tenant(Tenant(name, policy, when))
        return (await self.service.store.add_key(name, scope))[1]


def spoken(raw: bytes) -> str:
    """The text in a stream of chunks."""
    frames = [orjson.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
    choices = [choice for frame in frames for choice in frame.get("choices", ())]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def until(look: Callable[[], Awaitable[Any]], timeout: float = 5.0) -> Any:
    """What `look` returns, as soon as that is something."""
    async with asyncio.timeout(timeout):
        while not (found := await look()):
            await asyncio.sleep(0.01)
    return found


def settings(home: Path, engine: str, **changes: Any) -> Settings:
    """Settings for a gateway in `home` whose policy folder holds `office` and `open`."""
    folder = home / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "office.toml").write_text(POLICY)
    (folder / "open.toml").write_text(OPEN)
    usual: dict[str, Any] = {
        "home": home,
        "policies": folder,
        "default_policy": "office",
        "engine": EngineSettings(url=engine, model="fake"),
        "webhook": WebhookSettings(),
    }
    return Settings(**(usual | changes))


def webhook(url: str) -> WebhookSettings:
    """Settings that announce tickets there, on loopback."""
    return WebhookSettings(url=url, secret=SecretStr(SECRET), allow=["127.0.0.0/8"])


@asynccontextmanager
async def running(
    home: Path, upstream: FakeUpstream, *, ready: bool = True, start: float = 30, **changes: Any
) -> AsyncIterator[Gateway]:
    """A gateway on loopback before this engine, which gets `start` seconds; `changes` go to the settings."""
    chosen = changes.pop("settings", None) or settings(home, upstream.url, **changes)
    app = create_app(chosen)
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(serve(app))
        service: Service = app.state.service
        operators = await stack.enter_async_context(serve(create_admin_app(app, service.metrics), lifespan="off"))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        key, admin = [(await service.store.add_key("default", scope))[1] for scope in ("client", "admin")]
        if ready:
            assert await service.engine.wait(start) == "ready"
        yield Gateway(base, operators, service, http, upstream, key, admin, service.engine.model)


def free_port() -> int:
    """A port on loopback where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    """A fake engine."""
    async with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
async def gateway(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[Gateway]:
    """A gateway before the fake engine."""
    async with running(tmp_path, upstream) as gateway:
        yield gateway
