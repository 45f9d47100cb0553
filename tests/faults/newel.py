"""The gateway as an operator runs it: `newel serve` in a process of its own, to be stopped, killed and looked at."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

from app.records import Tenant, WhenStoreFails
from app.store import Store
from tests.gateway import OPEN, POLICY, free_port

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("newel")
QUICK = {"first_token_timeout": "1", "idle_timeout": "1", "total_timeout": "2"}
"""Settings under which a silent engine is given up soon."""


@dataclass(slots=True)
class Newel:
    """A gateway in `home`; `more` are settings in capitals or not (`idle_timeout`), `env` anything else."""

    home: Path
    engine: str
    database: str = ""
    more: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)
    when: WhenStoreFails = "refuse"
    files: int = 0
    process: subprocess.Popen[bytes] | None = None
    key: str = ""
    admin: str = ""

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def operators(self) -> str:
        """Where the operators' routes are."""
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite+aiosqlite:///{self.home / 'newel.db'}"

    @property
    def environment(self) -> dict[str, str]:
        """What the process gets: this tree's packages, and the settings of this gateway alone."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NEWEL_")}
        chosen = {
            "home": str(self.home),
            "config": str(self.home / "none.toml"),
            "policies": str(self.home / "policies"),
            "default_policy": "office",
            "engine__url": self.engine,
            "engine__model": "fake",
            "port": str(self.port),
            "admin__port": str(self.admin_port),
            "secret": "0" * 64,
            "encoder": os.environ.get("NEWEL_ENCODER", ""),
        }
        chosen |= {"database": self.database} if self.database else {}
        ours = {f"NEWEL_{name.upper()}": value for name, value in (chosen | self.more).items()}
        return kept | ours | {"PYTHONPATH": str(ROOT)} | self.env

    async def prepared(self) -> Self:
        """Itself, with its policies written and keys made."""
        folder = self.home / "policies"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "office.toml").write_text(POLICY)
        (folder / "open.toml").write_text(OPEN)
        store = await Store.open(self.database_url, self.home / "spill-of-the-test")
        try:
            await store.put_tenant(Tenant("default", "office", self.when))
            self.key, self.admin = [(await store.add_key("default", scope))[1] for scope in ("client", "admin")]
        finally:
            await store.close()
        return self

    def start(self) -> None:
        """Starts the process; `ready` tells when it serves."""
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(COMMAND), "serve"],
                env=self.environment,
                cwd=self.home,
                stdout=log,
                stderr=log,
                preexec_fn=self._files,
            )

    def _files(self) -> None:
        if self.files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.files, self.files))

    async def ready(self, timeout: float = 30.0) -> float:
        """The seconds until it answers 200 to /readyz."""
        began = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as session:
            while time.monotonic() - began < timeout:
                if self.process and self.process.poll() is not None:
                    raise AssertionError(f"the gateway ended with code {self.process.returncode}: {self.log[-2000:]}")
                try:
                    async with session.get(f"{self.base}/readyz") as answer:
                        if answer.status == 200:
                            return time.monotonic() - began
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(0.02)
        raise AssertionError(f"the gateway is not ready after {timeout} s: {self.log[-2000:]}")

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def rss(self) -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def ended(self, timeout: float = 40.0) -> int:
        """The exit code, once the process has ended."""
        assert self.process
        async with asyncio.timeout(timeout):
            while (code := self.process.poll()) is None:
                await asyncio.sleep(0.01)
        return code

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    # --- what clients do

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        """A chat request that asks this."""
        return {"model": "fake", "messages": [{"role": "user", "content": text}]} | more

    def headers(self, key: str = "") -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key}"}

    async def store(self) -> Store:
        """What it has stored, as another process sees it."""
        return await Store.open(self.database_url, self.home / "spill-of-the-test")
