"""A throw-away Redis or Valkey server from the program on this machine (Debian: apt-get install redis-server)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis


def program() -> str | None:
    """The server's program, or None."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


class Server:
    """A server on a Unix socket in a temporary folder."""

    def __init__(self, program: str, *options: str):
        self.folder = Path(tempfile.mkdtemp(prefix="newel-redis-", dir="/tmp"))
        self.socket = self.folder / "socket"
        self.command = [program, "--port", "0", "--unixsocket", str(self.socket), "--save", "", *options]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.process = subprocess.Popen([*self.command, "--dir", str(self.folder)], stdout=subprocess.DEVNULL)
        for _ in range(200):
            try:
                with redis.Redis(unix_socket_path=str(self.socket)) as client:
                    client.ping()
                return
            except redis.exceptions.ConnectionError:
                time.sleep(0.02)
        raise RuntimeError("redis-server did not start")

    def freeze(self, frozen: bool) -> None:
        """Stops the process where it stands, as a server on a dead network looks; or lets it go on."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)
