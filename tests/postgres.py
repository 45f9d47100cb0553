"""A throw-away PostgreSQL server from the programs on this machine (Debian: apt-get install postgresql)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "''",
    "max_connections": "100",
}


def programs() -> Path | None:
    """The folder with initdb and pg_ctl of the newest PostgreSQL here, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    candidates = [*found[::-1], *([Path(on_path)] if on_path else [])]
    return next((path.parent for path in candidates if (path.parent / "pg_ctl").exists()), None)


class Cluster:
    """A server in a temporary folder, on a Unix socket in it; root runs it as the user postgres."""

    def __init__(self, bin: Path):
        self.bin = bin
        # /tmp, because a socket's path may have 107 characters and pytest's folders are closed to other users
        self.folder = Path(tempfile.mkdtemp(prefix="newel-pg-", dir="/tmp"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "-D", self.data, "-U", "newel", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        settings = "".join(f"{name} = {value}\n" for name, value in FAST.items())
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"{settings}unix_socket_directories = '{self.folder}'\n")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [str(self.bin / program), *map(str, arguments)]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def start(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-l", self.folder / "log", "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def freeze(self, frozen: bool) -> None:
        """Stops the processes where they stand, as a server on a dead network looks; or lets them go on."""
        main = int((self.data / "postmaster.pid").read_text().split()[0])
        workers = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        for process in [main, *map(int, workers)]:
            with suppress(ProcessLookupError):  # an autovacuum worker that has just ended
                os.kill(process, signal.SIGSTOP if frozen else signal.SIGCONT)

    def create_database(self, name: str) -> str:
        """The URL of a new, empty database."""
        self._run("createdb", "-h", self.folder, "-U", "newel", name)
        return f"postgresql+psycopg://newel@/{name}?host={self.folder}"

    def remove(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)
