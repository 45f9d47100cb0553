"""The real `openai` package from npm against the gateway: verdicts, streams, tools, errors.

Node is asked for nothing but the package that package-lock.json names; it is installed once into a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.test_openai_tools import call, script
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, SALARY, Gateway

HERE = Path(__file__).parent / "node"
NODE, NPM = shutil.which("node"), shutil.which("npm")
CACHE = Path(os.environ.get("NEWEL_CI_CACHE", Path.home() / ".cache" / "newel-tests"))
pytestmark = pytest.mark.skipif(not (NODE and NPM) and not os.environ.get("CI"), reason="node and npm are not here")
STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]


@pytest.fixture(scope="module")
def modules() -> Path:
    """The folder in which the package is, as the lock file has it."""
    lock = (HERE / "package-lock.json").read_bytes()
    folder = CACHE / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder / name)
        subprocess.run([str(NPM), "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, check=True)
        (folder / "done").touch()
    return folder


async def talk(gateway: Gateway, modules: Path, case: str, said: str = "Hello") -> Any:
    """What the script says of one case."""
    process = await asyncio.create_subprocess_exec(
        str(NODE),
        str(HERE / "talk.mjs"),
        gateway.base,
        gateway.key,
        case,
        env={"PATH": os.environ["PATH"], "MODULES": str(modules), "SAID": said},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    return json.loads(out)


async def test_verdicts_of_whole_replies(gateway: Gateway, upstream: FakeUpstream, modules: Path) -> None:
    helped = await talk(gateway, modules, "whole")
    assert (helped["text"], helped["refusal"], helped["reason"]) == ("Hello there.", None, "stop")
    assert helped["action"] == "allow" and helped["id"].startswith("req_")
    refused = await talk(gateway, modules, "whole", "What is the salary of Jane?")
    assert (refused["text"], refused["reason"], refused["action"]) == (SALARY, "content_filter", "refuse")
    upstream.script = Script(["Write to jane@example.com."])
    redacted = await talk(gateway, modules, "whole", "Who?")
    assert (redacted["text"], redacted["action"]) == ("Write to [EMAIL].", "redact")
    escalated = await talk(gateway, modules, "whole", "My boss harasses me")
    assert escalated["text"].startswith(f"{CRISIS}\n\nYour reference is ESC-") and escalated["reason"] == "stop"


async def test_verdicts_of_streams(gateway: Gateway, upstream: FakeUpstream, modules: Path) -> None:
    helped = await talk(gateway, modules, "streamed")
    assert helped == {"text": "Hello there.", "reason": "stop", "action": "allow"}
    refused = await talk(gateway, modules, "streamed", "What is the salary of Jane?")
    assert refused == {"text": SALARY, "reason": "content_filter", "action": "refuse"}
    assert await talk(gateway, modules, "helper") == {"text": "Hello there.", "reason": "stop"}
    upstream.script = Script(STOPPED)
    stopped = await talk(gateway, modules, "streamed", "How?")
    assert stopped == {"text": f"First \n\n{BOMB}", "reason": "content_filter", "action": "refuse"}


async def test_tools(gateway: Gateway, upstream: FakeUpstream, modules: Path) -> None:
    upstream.script = script(call("find", '{"q": ', "1}"))
    assert await talk(gateway, modules, "tools") == {"calls": [["find", '{"q": 1}']], "reason": "tool_calls"}


async def test_responses(gateway: Gateway, modules: Path) -> None:
    helped = await talk(gateway, modules, "responses")
    assert helped == {"text": "Hello there.", "status": "completed", "why": None}
    refused = await talk(gateway, modules, "responses", "salary of Jane")
    assert refused == {"text": SALARY, "status": "incomplete", "why": "content_filter"}
    streamed = await talk(gateway, modules, "responses helper")
    assert (streamed["text"], streamed["status"]) == ("Hello there.", "completed")
    assert (streamed["first"], streamed["last"]) == ("response.created", "response.completed")


async def test_moderations(gateway: Gateway, modules: Path) -> None:
    assert (await talk(gateway, modules, "moderations", "salary of Jane"))["flagged"] is True
    assert (await talk(gateway, modules, "moderations"))["flagged"] is False


async def test_errors_are_the_sdks(gateway: Gateway, upstream: FakeUpstream, modules: Path) -> None:
    wrong = await talk(gateway, modules, "wrong key")
    assert wrong == {"kind": "AuthenticationError", "status": 401, "code": "invalid_api_key"}
    missing = await talk(gateway, modules, "no model")
    assert missing == {"kind": "NotFoundError", "status": 404, "code": "model_not_found"}
    upstream.script = Script(["Some words. ", "More of them. "], end="error")
    broken = await talk(gateway, modules, "stream fails")
    assert broken == {"kind": "APIError", "status": None, "code": "engine_broken"}
    upstream.script = Script(status=503, retry_after="7")
    busy = await talk(gateway, modules, "fails")
    assert busy == {"kind": "InternalServerError", "status": 503, "code": "engine_busy"}


async def test_a_busy_engine_is_tried_again(gateway: Gateway, upstream: FakeUpstream, modules: Path) -> None:
    upstream.queue += [Script(status=503, retry_after="0")]
    assert await talk(gateway, modules, "retries") == {"text": "Hello there."}
