"""Where the model runs: an OpenAI-compatible URL that is probed, or vLLM or the embedded engine as a process of ours.

`Engine.start()` returns at once; `state` and `on_change` tell the rest. A process that ends, or does not answer its
health probe for HUNG seconds, is started again with growing pauses. After TRIES starts that came to nothing the state
is "failed", with the reason in `last_error`, and a new start is tried once every PAUSES.cap seconds: what was missing
may have come.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import aiohttp

from alignment import pretrained
from app.launch import TOOLING, EngineError, Kind, Plan, choose, installed
from app.settings import EngineSettings

log = logging.getLogger("newel.engine")

State = Literal["starting", "ready", "restarting", "failed", "stopped"]

TRIES = 5
HUNG = 60.0
_LOG_BYTES = 5_000_000
# How long a start takes until it was measured here, in seconds.
_USUAL_START = {"external": 5.0, "vllm": 90.0, "cpu": 15.0}


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds between starts: `first`, doubled each time up to `cap`, each made up to half shorter by chance."""

    first: float = 0.5
    cap: float = 60.0

    def after(self, failures: int) -> float:
        """Returns the pause after so many failures in a row (from 1)."""
        longest = min(self.cap, self.first * 2.0 ** min(failures - 1, 20))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, no secret)


class Engine:
    """One engine and its supervision. Use it from one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        home: Path,
        *,
        on_change: Callable[[Engine], None] | None = None,
        pauses: Pauses = Pauses(),
        grace: float = 10.0,
    ) -> None:
        self._settings, self._home, self._on_change = settings, home, on_change
        self._pauses, self._grace = pauses, grace
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tail: deque[str] = deque(maxlen=40)
        self._failures = 0
        self._since = time.monotonic()
        self._start_took: float | None = None
        self._next_start = 0.0
        self._changed = asyncio.Event()
        self.state: State = "stopped"
        self.kind: Kind = "external" if settings.url else "cpu"
        self.url = _base(settings.url) if settings.url else ""
        self.model = settings.model if settings.url else _name(settings.model)
        self.api_key = settings.api_key.get_secret_value() if settings.api_key else ""
        self.without = self._lacking()
        self.doing = ""
        self.restarts = 0
        self.last_error: str | None = None

    @property
    def pid(self) -> int | None:
        """The process that holds the engine (its parent), while there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def retry_after(self) -> int:
        """Seconds after which it makes sense to ask again, at least 1."""
        now = time.monotonic()
        usual = self._start_took or _USUAL_START[self.kind]
        if self.state == "ready":
            return 1
        if self.state == "failed":
            return max(5, round(self._next_start - now))
        if self.state == "restarting" and self._next_start > now:
            return max(1, round(self._next_start - now + usual))
        return max(2, round(self._since + usual - now))

    async def start(self) -> None:
        """Begins supervising and returns at once; a second call does nothing."""
        if self._task is None or self._task.done():
            self._failures = 0
            self._set("starting")
            run = self._watch_external if self._settings.url else self._supervise
            self._task = asyncio.create_task(run(), name="engine")

    async def stop(self) -> None:
        """Ends the engine, all its processes included, and returns when they are gone."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._set("stopped")

    async def wait(self, timeout: float | None = None) -> State:
        """Returns the state as soon as it is ready, failed or stopped, or what it is after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.state not in ("ready", "failed", "stopped"):
                    self._changed.clear()
                    await self._changed.wait()
        return self.state

    def _set(self, state: State) -> None:
        if state == self.state:
            return
        if state in ("starting", "restarting") or self.state == "stopped":
            self._since = time.monotonic()
        self.state = state
        self._changed.set()
        log.info("engine %s is %s", self.model, state, extra={"engine": self.kind, "restarts": self.restarts})
        if self._on_change:
            self._on_change(self)

    def _lacking(self) -> frozenset[str]:
        """What this engine must not be sent by its settings: a vLLM of ours calls tools only with a parser for them."""
        chosen = frozenset(self._settings.without)
        parses = self.kind != "vllm" or "--enable-auto-tool-choice" in self._settings.args
        return chosen if parses and "tools" not in chosen else chosen | TOOLING

    # -- a process of ours ------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Starts the engine again and again, until cancelled."""
        while True:
            try:
                await self._once()
            except (EngineError, pretrained.ModelError, OSError) as error:
                self.last_error = str(error)
            except Exception as error:  # the edge: supervision itself must not die unseen
                log.exception("starting the engine %s failed in a way that is not known", self.model)
                self.last_error = f"{type(error).__name__}: {error}"
            finally:
                await self._end()
            self._failures += 1
            pause = self._pauses.after(self._failures)
            if self._failures >= TRIES:
                pause = self._pauses.cap
            self._next_start = time.monotonic() + pause
            self._set("failed" if self._failures >= TRIES or self._process is None else "restarting")
            log.warning("engine %s ended; next start in %.1f s: %s", self.model, pause, self.last_error)
            await asyncio.sleep(pause)
            self.restarts += 1
            self._since = time.monotonic()

    async def _once(self) -> None:
        """Starts the engine and stays with it until it ends. Raises EngineError with the reason."""
        self._tail.clear()
        self._process = None
        plan = await self._plan()
        self.kind = plan.kind
        self.without = plan.without | self._lacking()
        self.doing = plan.why
        port = _free_port()
        self.url, self.api_key = f"http://127.0.0.1:{port}/v1", secrets.token_urlsafe(32)
        keys = {"VLLM_API_KEY": self.api_key, "NEWEL_ENGINE_API_KEY": self.api_key}
        command = [*plan.command, "--host", "127.0.0.1", "--port", str(port), *self._settings.args]
        began = time.monotonic()
        self._process = await self._launch(command, {**plan.env, **keys})
        reading = asyncio.create_task(self._read(self._process))
        try:
            await self._until_ready(self._process)
            self._start_took = time.monotonic() - began
            self._failures, self.last_error, self.doing = 0, None, ""
            log.info("engine %s (%s) ready after %.1f s", self.model, plan.kind, self._start_took)
            self._set("ready")
            await self._while_healthy(self._process)
        finally:
            await self._end()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(reading, 5)
        raise EngineError(self._why_ended(self._process.returncode))

    async def _plan(self) -> Plan:
        """Returns how to start. Gets the model first if it is not there. Raises EngineError or ModelError."""
        python = self._settings.python or sys.executable
        found = await installed(python)
        plan = choose(self._settings.kind, python, found)
        model = await self._model(plan.kind)
        named = ["--model", model, "--served-model-name", self.model]
        env = dict(plan.env)
        if model != self._settings.model:  # a folder here: nothing is to be asked of the hub
            env["HF_HUB_OFFLINE"] = "1"
        if plan.kind == "cpu":
            env["PYTHONPATH"] = str(_exposed(self._home))
        return replace(plan, command=[*plan.command, *named], env=env)

    async def _model(self, kind: Kind) -> str:
        """Returns the checkpoint folder, or for vLLM a hub id that it fetches by itself."""
        name = self._settings.model
        if there := pretrained.find(name, home=self._home):
            return str(there)
        if kind == "vllm" and "/" in name and name == self.model:
            return name
        # Converting needs torch: the engine's environment has it whenever it has an engine; ours may have gguf too.
        ours = await installed(sys.executable)
        python = sys.executable if ours["torch"] and ours["gguf"] else self._settings.python or sys.executable
        return str(await _aside(lambda: pretrained.pull(name, home=self._home, report=self._report, python=python)))

    def _report(self, line: str) -> None:
        self.doing = line
        log.info("%s", line)

    async def _launch(self, command: list[str], env: dict[str, str]) -> asyncio.subprocess.Process:
        leash = Path(__file__).with_name("leash.py")
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(leash),
            str(self._grace),
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Copies the engine's output to its log, and keeps the last lines."""
        assert process.stdout is not None  # noqa: S101 (it was asked for)
        path = self._home / "logs" / "engine.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        rest = b""
        while data := await process.stdout.read(65536):
            _append(path, data)
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            self._tail.extend(t for line in lines if (t := line.decode(errors="replace").rstrip()))
            rest = rest[-4096:]

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        """Returns when the engine has answered a completion. Raises EngineError when it ends or takes too long."""
        deadline = time.monotonic() + self._settings.start_timeout
        async with self._client() as client:
            while process.returncode is None:
                if time.monotonic() > deadline:
                    limit = f"{self._settings.start_timeout:.0f} s (engine.start_timeout)"
                    raise EngineError(f"not ready after {limit}; its last lines:\n{self._last()}")
                if await self._healthy(client) and await self._answers(client, deadline - time.monotonic()):
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 0.25)
        raise EngineError(self._why_ended(process.returncode))

    async def _while_healthy(self, process: asyncio.subprocess.Process) -> None:
        """Returns when the process has ended. Raises EngineError when it was silent for HUNG seconds."""
        heard = time.monotonic()
        async with self._client() as client:
            while process.returncode is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 5.0)
                if _runs(process) and await self._healthy(client):
                    heard = time.monotonic()
                elif time.monotonic() - heard > HUNG:
                    raise EngineError(f"it did not answer /health for {HUNG:.0f} s; its last lines:\n{self._last()}")

    async def _end(self) -> None:
        """Lets go of the leash and waits until every process is gone."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.shield(asyncio.wait_for(process.wait(), self._grace + 5))
        except TimeoutError:
            process.kill()  # the leash itself hangs; the system then kills the engine (PR_SET_PDEATHSIG)
            await process.wait()

    def _why_ended(self, status: int | None) -> str:
        how = f"was killed by signal {status - 128}" if status and status > 128 else f"ended with status {status}"
        return f"the engine {how}; its last lines:\n{self._last()}"

    def _last(self) -> str:
        return "\n".join(list(self._tail)[-15:]) or "(it printed nothing)"

    # -- probes -----------------------------------------------------------------------------------------------------

    def _client(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=10))

    async def _healthy(self, client: aiohttp.ClientSession) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with client.get(self.url.removesuffix("/v1") + "/health") as response:
                return response.status == 200
        return False

    async def _answers(self, client: aiohttp.ClientSession, seconds: float) -> bool:
        """Returns whether one token came. An engine may listen long before it can do that."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        limit = aiohttp.ClientTimeout(total=max(1.0, seconds))
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with client.post(f"{self.url}/chat/completions", json=body, timeout=limit) as response:
                if response.status == 200:
                    return True
                if response.status < 500:
                    text = (await response.text())[:300]
                    raise EngineError(f"the engine refuses a plain completion with status {response.status}: {text}")
        return False

    async def _watch_external(self) -> None:
        """Probes an engine that is not ours every few seconds, until cancelled."""
        async with self._client() as client:
            while True:
                self.last_error, fatal = await self._probe_external(client)
                if self.last_error is None:
                    self._set("ready")
                elif fatal:
                    self._set("failed")
                else:
                    self._set("starting" if self.state == "starting" else "restarting")
                pause = 5.0 if self.state == "ready" else min(5.0, self._pauses.cap)
                self._next_start = time.monotonic() + pause
                await asyncio.sleep(pause)

    async def _probe_external(self, client: aiohttp.ClientSession) -> tuple[str | None, bool]:
        """Returns what is wrong (None: nothing), and whether only an operator can mend it."""
        try:
            async with client.get(f"{self.url}/models") as response:
                if response.status in (401, 403):
                    return f"{self.url} refuses the key in engine.api_key (status {response.status})", True
                if response.status != 200:
                    return f"{self.url}/models answered with status {response.status}", response.status < 500
                names = [str(entry["id"]) for entry in (await response.json())["data"]]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"{self.url} cannot be reached: {str(error) or type(error).__name__}", False
        except (ValueError, KeyError, TypeError):
            return f"{self.url}/models did not answer as an OpenAI-compatible server does", True
        if self._settings.model in names:
            self.model = self._settings.model
        elif len(names) == 1:
            self.model = names[0]
        else:
            return f"{self.url} has no model {self._settings.model!r} (engine.model); it has: {', '.join(names)}", True
        return None, False


async def _aside(work: Callable[[], Path]) -> Path:
    """Returns what `work` returns, done in a thread that nobody waits for at exit (a download may take minutes)."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Path] = loop.create_future()

    def settle(result: Path | None, error: Exception | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        elif result is not None:
            done.set_result(result)

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except Exception as error:  # handed over to whoever awaits
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name="pull", daemon=True).start()
    return await done


def _runs(process: asyncio.subprocess.Process) -> bool:
    return process.returncode is None


def _base(url: str) -> str:
    """Returns an OpenAI base URL: as given, with /v1 where there is no path at all."""
    url = url.rstrip("/")
    return url if urlsplit(url).path else f"{url}/v1"


def _name(model: str) -> str:
    """Returns the name that clients ask for: of a path its last part, else the model's own."""
    return pretrained.slug(model) if Path(model).expanduser().exists() else model


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exposed(home: Path) -> Path:
    """Returns a folder that shows another Python our package `alignment` and nothing else of our environment."""
    folder = home / "run" / "path"
    folder.mkdir(parents=True, exist_ok=True)
    link, target = folder / "alignment", Path(pretrained.__file__).resolve().parent
    if not link.exists() or link.resolve() != target:
        fresh = folder / f".alignment-{os.getpid()}"
        fresh.symlink_to(target)
        fresh.replace(link)
    return folder


def _append(path: Path, data: bytes) -> None:
    """Writes to a log, set aside as NAME.1 when full; a disk that cannot take it costs the log, not the engine."""
    with contextlib.suppress(OSError):
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        with path.open("ab") as file:
            file.write(data)
