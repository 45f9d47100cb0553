"""Putting the gateway together: the one place where its parts meet."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import admin, api
from app.api import JsonResponse
from app.auth import Keys
from app.backends import OpenAIBackend, Timeouts, Upstream
from app.desk import Courier
from app.engine import Engine
from app.errors import ApiError
from app.logs import configure, event
from app.metrics import Metrics
from app.middleware import RequestContext
from app.policies import PolicyBook
from app.records import Tenant
from app.service import Service
from app.settings import Settings
from app.store import Store

REFRESH = 1.0
"""Seconds between two looks for policies that were activated elsewhere."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The gateway as an ASGI app; its lifespan opens the store, starts the engine and stops both."""
    settings = settings or Settings()
    configure(settings.log_level)
    metrics = Metrics()
    app = FastAPI(title="newel", lifespan=_lifespan(settings, metrics))
    app.include_router(api.router)
    app.include_router(admin.router)
    app.add_middleware(RequestContext, metrics=metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


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
    store = await Store.open(settings.database_url, settings.home / "spill")
    stack.push_async_callback(store.close)
    await _first_tenant(store, settings)
    engine = Engine(settings.engine, settings.home)
    session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    timeouts = Timeouts(settings.first_token_timeout, settings.idle_timeout, settings.total_timeout)
    backend = OpenAIBackend(session, lambda: _upstream(engine), timeouts)
    policies = PolicyBook(store, [settings.policies] if settings.policies else [])
    service = Service(settings, read_secret(settings), store, Keys(store), policies, engine, backend, metrics)
    stack.push_async_callback(_drain, service)
    stack.push_async_callback(engine.stop)
    for work in (engine.start, Courier(store, settings.webhook, metrics).run, lambda: _every(REFRESH, policies.refresh)):
        stack.push_async_callback(_cancel, asyncio.create_task(_watched(work)))
    return service


def _upstream(engine: Engine) -> Upstream:
    without = frozenset({"seed"}) if engine.kind == "vllm-cpu" else frozenset[str]()
    return Upstream(engine.url or "", engine.model, engine.api_key or "", without)


def read_secret(settings: Settings) -> bytes:
    """The key of this service's HMACs: from the settings, else a file in `home` that is made once (mode 0600)."""
    if settings.secret:
        return settings.secret.get_secret_value().encode()
    path: Path = settings.home / "secret"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    return path.read_bytes()


async def _first_tenant(store: Store, settings: Settings) -> None:
    if not await store.tenants():
        await store.put_tenant(Tenant("default", settings.default_policy))


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await work()


async def _watched(work: Callable[[], Awaitable[None]]) -> None:
    """Runs background work and says so when it dies, since nobody awaits it."""
    try:
        await work()
    except Exception as error:
        event("background_work_failed", logging.ERROR, exc_info=error)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _drain(service: Service) -> None:
    """Waits for the records of turns whose clients are gone."""
    if service.tasks:
        await asyncio.wait(set(service.tasks), timeout=10)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JsonResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JsonResponse(ApiError(error.status_code, message, code=code).body, status_code=error.status_code)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = str(first["loc"][-1])
    return JsonResponse(ApiError(400, f"Invalid value for '{place}': {first['msg']}.", code="invalid_value", param=place).body,
                        status_code=400)  # fmt: skip


async def _unexpected(request: Request, error: Exception) -> Response:
    event("request_failed", logging.ERROR, exc_info=error)
    body = ApiError(500, "Something went wrong on our side.", code="internal_error", kind="server_error").body
    return JsonResponse(body, status_code=500)
