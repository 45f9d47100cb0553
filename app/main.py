"""Putting the gateway together: the one place where its parts meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import api, embeddings, moderations, openapi
from app.auth import Auth
from app.backends import OpenAIBackend
from app.desk import Courier
from app.engine import Engine
from app.errors import ApiError, internal, store_down
from app.fleet import Fleet
from app.fleet.probes import look
from app.guard_models import GuardModels
from app.idempotency import Idempotency
from app.limits import open_limits
from app.logs import configure, event
from app.metrics import Metrics
from app.middleware import RequestContext
from app.policies import PolicyBook
from app.records import Tenant, now
from app.sealing import read_secret, sealing_secrets
from app.service import Service
from app.settings import Settings
from app.store import Conflict, NotFound, SpillFull, Store, StoreDown, StoreError
from app.surfaces import Surface
from app.surfaces.chat import Chat
from app.surfaces.completions import Completions
from app.surfaces.messages import Messages
from app.surfaces.responses import Responses
from app.tracing import open_tracer
from app.traffic import Traffic
from app.vault import SWEEP, open_vaults
from guardrails import encoder

if TYPE_CHECKING:
    from app.oidc import Oidc

REFRESH = 1.0
"""Seconds between two looks for policies that were activated elsewhere."""
SURFACES: dict[str, Surface] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completions(),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
}
RETAIN = 3600.0
"""Seconds between two deletions of what is older than the settings keep it."""
TEND = 5.0
"""Seconds between two clearings of the limits' ledger."""
SPARE = 60.0
"""Seconds that a request may need beside the wait for the engine."""
KEEPALIVE = 2.0
"""Seconds that an idle connection to the engine is kept: less than uvicorn's 5, after which it would hang up on us."""


def create_app(settings: Settings | None = None) -> Gateway:
    """The gateway as an ASGI app; its lifespan opens the store, starts the engine and stops both."""
    settings = settings or Settings()
    configure(settings.log_level)
    metrics = Metrics()
    app = Gateway(metrics, title="newel", lifespan=_lifespan(settings, metrics), openapi_url=None)
    for routes in (api.router, moderations.router, embeddings.router, openapi.router):
        app.include_router(routes)
    for kind in (ApiError, StoreError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _failed)
    return app


class Gateway(FastAPI):
    """FastAPI's app for everything but the road of chat requests, which goes round its layers (`app.hotpath`)."""

    def __init__(self, metrics: Metrics, **options: Any):
        super().__init__(**options)
        self.metrics = metrics
        self._context = RequestContext(super().__call__, metrics, SURFACES, lambda: self.state.service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or the lifespan."""
        await self._context(scope, receive, send)


def _lifespan(settings: Settings, metrics: Metrics) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.service = await _start(settings, metrics, stack)
            yield

    return lifespan


async def _start(settings: Settings, metrics: Metrics, stack: AsyncExitStack) -> Service:
    """The running service; what it started is stopped by `stack`, in reverse."""
    settings.home.mkdir(parents=True, exist_ok=True)
    encoder.look_in(settings.home)
    secret = read_secret(settings)
    secrets = sealing_secrets(settings, secret)
    store = await Store.open(settings.database_url, settings.home / "spill", settings.log_delay, secrets)
    stack.push_async_callback(store.close)
    metrics.watch(store.writer)
    await _first_tenant(store, settings)
    engine = Engine(settings.engine, settings.home)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE)
    no_limit = aiohttp.ClientTimeout(total=None)  # OpenAIBackend times its waits itself
    session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=no_limit))
    fleet = Fleet(settings, engine, partial(OpenAIBackend, session), partial(look, session), metrics)
    judges = GuardModels(settings.guard_models, session, metrics, settings.guard_requests, settings.guard_seconds)
    policies = PolicyBook(store, [settings.policies] if settings.policies else [], metrics, judges)
    vaults = open_vaults(store, settings, secret)
    auth = Auth(store, settings, metrics, _oidc(settings, session, metrics, secret))
    limits = open_limits(settings, store.database, metrics)
    idempotency = Idempotency(
        store.database, settings.total_timeout + SPARE, settings.idempotency.wait, settings.idempotency.ttl
    )
    traffic = Traffic(fleet, limits, settings.total_timeout, settings.max_tokens)
    if tracer := open_tracer(settings.tracing):
        stack.push_async_callback(asyncio.to_thread, tracer.close)
    service = Service(
        settings, secret, store, policies, engine, fleet, auth, traffic, idempotency, metrics, judges, vaults, tracer
    )
    for closing in (auth.close, limits.close, idempotency.close, fleet.close):
        stack.push_async_callback(closing)
    stack.push_async_callback(_drain, service)
    stack.push_async_callback(engine.stop)
    if fleet.uses_engine:
        await engine.start()  # before the policies are loaded: it takes longer, and does so by itself
    await fleet.start()
    await _warm(service)
    await vaults.sweep()
    for work in (
        Courier(store, settings.webhook).run,
        lambda: _every(REFRESH, policies.refresh),
        lambda: _every(SWEEP, vaults.sweep),
        lambda: _every(TEND, limits.tend),
        lambda: _every(RETAIN, partial(_retain, store, settings)),
        lambda: _every(SWEEP, idempotency.sweep),
    ):
        stack.push_async_callback(_cancel, service.spawn(work()))
    return service


def _oidc(settings: Settings, session: aiohttp.ClientSession, metrics: Metrics, secret: bytes) -> Oidc | None:
    """Reads tokens where there is an issuer; without one its library is not loaded."""
    if not settings.auth.oidc.issuer:
        return None
    from app.oidc import Oidc

    return Oidc(settings.auth.oidc, session, metrics, secret)


async def _first_tenant(store: Store, settings: Settings) -> None:
    if not await store.tenants():
        await store.put_tenant(Tenant("default", settings.default_policy))


async def _warm(service: Service) -> None:
    """Loads the policies of all tenants, and closes the turns that an earlier process left open."""
    for tenant in await service.store.tenants():
        with suppress(ApiError):  # it is in the log, and that tenant's turns are answered with 503
            await service.policies.of(tenant.policy)
    longest = 2 * service.settings.total_timeout
    await service.store.open_turns(now() - timedelta(seconds=longest))


async def _retain(store: Store, settings: Settings) -> None:
    await store.sweep(settings.retention.periods)


async def _every(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception as error:
            event("background_work_failed", logging.ERROR, exc_info=error)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _drain(service: Service) -> None:
    """Waits for the records of turns whose clients are gone."""
    with suppress(TimeoutError):
        async with asyncio.timeout(10):
            while service.tasks:
                await asyncio.wait(set(service.tasks))


async def _failed(request: Request, error: Exception) -> Response:
    return _as_api_error(request, error).response


def _as_api_error(request: Request, error: Exception) -> ApiError:
    """What a client is told of an error that a route raised."""
    match error:
        case ApiError():
            return error
        case StoreDown() | SpillFull():
            return store_down()
        case NotFound():
            return ApiError(404, f"{error}.", code="not_found")
        case Conflict():  # SDKs send again what a 409 answered, which is of no use here
            return ApiError(422, f"{error}.", code="conflict")
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
            message = f"{request.method} {request.url.path}: {error.detail}."
            return ApiError(error.status_code, message, code=code, headers=error.headers)
        case RequestValidationError():
            first = error.errors()[0]
            place = str(first["loc"][-1])
            return ApiError(400, f"Invalid value for '{place}': {first['msg']}.", code="invalid_value", param=place)
    event("request_failed", logging.ERROR, exc_info=error)
    return internal()
