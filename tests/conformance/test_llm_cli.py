"""Simon Willison's `llm` against the gateway: its own command, with a model of its extra-openai-models.yaml."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.conformance.test_openai_tools import call, script
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, SALARY, Gateway

STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]
FIND = 'def find(q: int) -> str:\n    "Finds something."\n    return str(q)\n'


@pytest.fixture
def home(tmp_path: Path, gateway: Gateway) -> Path:
    """A folder of `llm` that knows the gateway."""
    folder = tmp_path / "llm"
    folder.mkdir()
    models = (("ours", "fake", "good"), ("missing", "none", "good"), ("locked", "fake", "wrong"))
    (folder / "extra-openai-models.yaml").write_text("".join(_model(gateway, *one) for one in models))
    (folder / "keys.json").write_text(json.dumps({"good": gateway.key, "wrong": "nk-wrong"}))
    (folder / "find.py").write_text(FIND)
    return folder


def _model(gateway: Gateway, name: str, model: str, key: str) -> str:
    told = f"- model_id: {name}\n  model_name: {model}\n  api_base: {gateway.base}/v1\n"
    return f"{told}  api_key_name: {key}\n  supports_tools: true\n"


async def llm(home: Path, *said: str, model: str = "ours") -> tuple[int, str]:
    """(exit status, output) of the command; what goes wrong is on the output, too."""
    environment = {"PATH": os.environ["PATH"], "LLM_USER_PATH": str(home), "HOME": str(home)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llm", "-m", model, *said),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode().strip()


@pytest.mark.parametrize("options", [(), ("--no-stream",)], ids=["stream", "whole"])
async def test_verdicts(home: Path, gateway: Gateway, upstream: FakeUpstream, options: tuple[str, ...]) -> None:
    assert await llm(home, *options, "Hello") == (0, "Hello there.")
    assert await llm(home, *options, "What is the salary of Jane?") == (0, SALARY)
    upstream.script = Script(["Write to jane@example.com."])
    assert await llm(home, *options, "Who?") == (0, "Write to [EMAIL].")
    _, told = await llm(home, *options, "My boss harasses me")
    assert told.startswith(f"{CRISIS}\n\nYour reference is ESC-")
    upstream.script = Script(STOPPED)
    _, told = await llm(home, *options, "How?")
    assert told == (BOMB if options else f"First \n\n{BOMB}")


async def test_a_conversation_is_continued(home: Path, gateway: Gateway, upstream: FakeUpstream) -> None:
    await llm(home, "I am Ann.")
    await llm(home, "-c", "Who am I?")
    asked = [one["content"] for one in upstream.seen[1].body["messages"][1:]]
    assert asked == ["I am Ann.", "Hello there.", "Who am I?"]


async def test_a_tool_is_called(home: Path, gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [script(call("find", '{"q": ', "1}")), Script(["It is 1."])]
    status, told = await llm(home, "--functions", str(home / "find.py"), "What?")
    assert (status, told) == (0, "It is 1.")
    assert upstream.seen[1].body["messages"][-1]["content"] == "1"


async def test_errors_say_what_is_wrong(home: Path, gateway: Gateway, upstream: FakeUpstream) -> None:
    status, told = await llm(home, "Hello", model="locked")
    assert status and "The API key is not known" in told
    status, told = await llm(home, "Hello", model="missing")
    assert status and "The model 'none' does not exist" in told
    upstream.script = Script(["Some words. ", "More of them. "], end="error")
    status, told = await llm(home, "Hello")
    assert status and "The engine" in told
