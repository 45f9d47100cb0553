"""`newel demo`, as a process of its own: with a fake engine that says what is wanted, and with the real small model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.store import Store
from tests.fakes import FakeUpstream, Script, Seen
from tests.gateway import free_port

ROOT = Path(__file__).parents[2]
TOUR = (
    ("Prepare ", "examples ", "of your work."),
    ("Send your receipts to HR.",),
    ("Jane is at jane.", "miller@example.com."),
)
TOUR += (("That depends on your contract.",), ("Bring what you wrote down.",))

VERDICTS = ["allow", "refuse", "refuse", "redact", "redact", "append", "escalate", "allow"]


def engine() -> FakeUpstream:
    """An engine that answers the five questions of the tour that reach a model, and says No to every grader."""
    upstream = FakeUpstream()
    upstream.queue.extend(Script(deltas) for deltas in TOUR)
    return upstream


async def demo(home: Path, *args: str, **settings: str) -> tuple[int, str]:
    """(the exit code, everything that was printed) of `newel demo` in this home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEWEL_")}
    environment = kept | {"NEWEL_ENCODER": os.environ["NEWEL_ENCODER"]}
    environment |= {"NEWEL_HOME": str(home), "NEWEL_CONFIG": str(home / "none.toml")} | settings
    command = [sys.executable, "-c", "from app.cli import main; main()", "demo", *args]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 600)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def before(upstream: FakeUpstream, home: Path, *args: str) -> tuple[int, str]:
    """The demo before this engine, on a free port unless `args` name one."""
    port = args or ("--port", str(free_port()))
    return await demo(home, *port, NEWEL_ENGINE__URL=upstream.url, NEWEL_ENGINE__MODEL="fake")


def asked(seen: Sequence[Seen]) -> str:
    return json.dumps([request.body.get("messages") for request in seen])


async def test_the_tour_shows_every_verdict_and_ends_well(tmp_path: Path) -> None:
    async with engine() as upstream:
        code, out = await before(upstream, tmp_path)
        assert code == 0, out
        assert re.findall(r"^  verdict +(\w+)", out, re.MULTILINE) == VERDICTS
        assert "4111" not in asked(upstream.seen)
        assert "[CARD]" in asked(upstream.seen)
        assert len(upstream.seen) == len(TOUR)
    assert "saw       My card [CARD] was charged" in out
    assert "(HMAC-SHA256, verified)" in out
    assert "12 steps, each as it should be" in out
    assert "jane.miller@example.com" not in re.sub(r"(?m)^  asked .*$", "", out)
    pairs = [json.loads(line) for line in (tmp_path / "demo" / "export" / "pairs.jsonl").read_text().splitlines()]
    assert [pair["source"] for pair in pairs] == ["correction"]
    assert "Traceback" not in out


async def test_a_second_demo_uses_the_same_keys_and_the_same_database(tmp_path: Path) -> None:
    kept, secrets = tmp_path / "demo" / "demo.json", []
    for _ in range(2):
        async with engine() as upstream:
            code, out = await before(upstream, tmp_path)
        assert code == 0, out
        secrets.append(kept.read_text())
    assert secrets[0] == secrets[1]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'demo' / 'newel.db'}", tmp_path / "spill")
    try:
        assert (len(await store.keys()), len(await store.tickets("demo", "answered"))) == (2, 2)
    finally:
        await store.close()


async def test_a_verdict_that_is_not_as_it_should_be_ends_the_demo_with_the_reason(tmp_path: Path) -> None:
    async with engine() as upstream:
        upstream.queue[3] = Script(("You could just kill yourself.",))
        code, out = await before(upstream, tmp_path)
    assert (code, "Traceback" in out) == (1, False)
    assert "newel: step 6 of the tour" in out
    assert "the verdict should be append, and is refuse" in out


async def test_a_reply_that_breaks_off_ends_the_demo_with_the_reason(tmp_path: Path) -> None:
    async with engine() as upstream:
        upstream.queue[0] = Script(("Prepare ",), end="error")
        code, out = await before(upstream, tmp_path)
    assert (code, "Traceback" in out) == (1, False)
    assert "newel: step 1 of the tour (An ordinary question is helped): the reply broke off: " in out


async def test_an_engine_that_does_not_come_ends_the_demo_with_the_log(tmp_path: Path) -> None:
    changes = {"NEWEL_ENGINE__URL": "http://127.0.0.1:9/v1", "NEWEL_ENGINE__START_TIMEOUT": "2"}
    code, out = await demo(tmp_path, "--port", str(free_port()), **changes)
    assert (code, "Traceback" in out) == (1, False)
    assert "the stack did not start; the end of its log:" in out
    assert str(tmp_path / "demo" / "logs" / "gateway.log") in out


async def test_a_taken_port_is_refused_when_it_was_asked_for_and_else_replaced(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with engine() as upstream:
            code, out = await before(upstream, tmp_path, "--port", port)
            assert (code, f"port {port} is taken" in out) == (1, True)
            settings = {"NEWEL_ENGINE__URL": upstream.url, "NEWEL_ENGINE__MODEL": "fake", "NEWEL_PORT": port}
            code, out = await demo(tmp_path, **settings)
            assert code == 0, out
            assert f"port {port} is taken by another program, so the demo listens on" in out


@pytest.mark.model
async def test_the_tour_goes_as_it_should_with_the_real_model(tmp_path: Path, model_dir: Path) -> None:
    began = time.monotonic()
    code, out = await demo(tmp_path, "--port", str(free_port()), "--exit", NEWEL_ENGINE__MODEL=str(model_dir))
    assert code == 0, out
    assert "12 steps, each as it should be" in out
    assert re.findall(r"^  verdict +(\w+)", out, re.MULTILINE) == VERDICTS
    assert time.monotonic() - began < 600
