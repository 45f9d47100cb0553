"""What a gateway holds in memory for as long as it runs."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from app.store import migrate
from guardrails.policy import load
from guardrails.spans import Spans

ROOT = Path(__file__).parents[2]
RULES = """
name = "rules"
persona = "You talk."

[[input]]
name = "secrets-in"
validator = "secrets"
action = "redact"

[[output]]
name = "personal-out"
validator = "personal"
action = "redact"
"""
SERVED = """
import asyncio, sys
from pathlib import Path
import app.cli, app.wire
from app.admin import create_admin_app
from app.main import create_app
from app.settings import Settings

async def serve(home):
    engine = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    app = create_app(Settings(home=home, policies=home, default_policy="rules", engine=engine))
    async with app.router.lifespan_context(app):
        policy = await app.state.service.policies.of("rules")
        assert policy.input and policy.output
    print(*sorted({name.partition(".")[0] for name in sys.modules}))

asyncio.run(serve(Path(sys.argv[1])))
"""
UNUSED = frozenset(
    [
        "alembic",
        "joserfc",
        "jsonschema",
        "numpy",
        "onnxruntime",
        "openai",
        "psycopg",
        "py3langid",
        "pygments",
        "rapidfuzz",
        "redis",
        "tokenizers",
        "torch",
        "transformers",
    ]
)
"""What only a setting, a validator, a migration or another command needs."""


def test_a_gateway_loads_only_what_its_settings_and_its_policy_need(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(RULES)
    asyncio.run(migrate(f"sqlite+aiosqlite:///{tmp_path / 'newel.db'}"))  # as after the first start
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"aiohttp", "fastapi", "sqlalchemy"} <= loaded
    assert not loaded & UNUSED


def test_policies_share_the_patterns_that_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(RULES)
    one, other = (load(tmp_path / "rules.toml").input[0].validator for _ in range(2))
    assert isinstance(one, Spans) and isinstance(other, Spans)
    assert one.spans and [span.unfinished for span in one.spans] == [span.unfinished for span in other.spans]
    assert all(a.unfinished is b.unfinished for a, b in zip(one.spans, other.spans, strict=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_was_freed_is_given_back_to_the_system() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from app import heap
def resident():
    return int(open("/proc/self/statm").read().split()[1])
held = [bytes(4000) for _ in range(20_000)]
last = bytes(4000)  # keeps the top of the heap
before = resident()
del held
heap.give_back()
print((before - resident()) * 4096 // 1_000_000)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 60
