"""The ways from a client to the engine: direct, through nginx, newel or a peer; how each is had and started."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NGINX = """
daemon off;
worker_processes 1;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;
    uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;
    upstream engine {{ server 127.0.0.1:{engine}; keepalive 64; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""
LITELLM = """
model_list:
  - model_name: fake
    litellm_params: {{model: openai/fake, api_key: none, api_base: "http://127.0.0.1:{engine}/v1"}}
litellm_settings: {{request_timeout: 600, telemetry: false, set_verbose: false}}
general_settings: {{master_key: {key}}}
"""
LITELLM_KEY = "sk-e1b7c04d9a52f6380c4d7be9215fa863"
"""Any one will do, but not the one of its documentation, which it turns down."""
OPEN = 'name = "open"\npersona = "You are a helpful assistant."\n'
MODELS = ("injection_model", "harm")
"""Validators of the policy `base` that ask the encoder."""


class Missing(Exception):
    """A way that cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Started:
    """A process that is to be run, and what its clients send besides the body."""

    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    key: Callable[[], str] | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One row. prepare: (an empty folder, its port, the engine's port, the cache) to what is started; how: in words."""

    name: str
    how: str
    prepare: Callable[[Path, int, int, Path], Started] | None


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def nginx(home: Path, port: int, engine: int, cache: Path) -> Started:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise Missing("nginx is not on this machine (Debian: apt-get install nginx-light)")
    home.chmod(0o755)
    (home / "nginx.conf").write_text(NGINX.format(home=home, port=port, engine=engine))
    return Started([program, "-p", str(home), "-c", str(home / "nginx.conf"), "-e", str(home / "error.log")])


def floor(home: Path, port: int, engine: int, cache: Path) -> Started:
    return Started([sys.executable, str(HERE / "floor.py"), str(port), f"http://127.0.0.1:{engine}"])


def rules() -> str:
    """The policy `base` without the rules that ask the encoder, and without the examples that are about those."""
    text = (ROOT / "guardrails" / "policies" / "base.toml").read_text(encoding="utf-8")
    blocks = re.split(r"(?m)^(?=\[)", text.replace('name = "base"', 'name = "rules"', 1))
    gone = [block for block in blocks if re.search(rf'(?m)^validator = "(?:{"|".join(MODELS)})"', block)]
    names = [found for block in gone for found in re.findall(r'(?m)^name = "(.*)"', block)]
    about = re.compile(rf'(?m)^rule = "(?:{"|".join(names)})"')
    return "".join(block for block in blocks if block not in gone and not about.search(block))


def newel(policy: str, source: str = "") -> Callable[[Path, int, int, Path], Started]:
    """newel with this policy, from its source or as it ships."""

    def prepare(home: Path, port: int, engine: int, cache: Path) -> Started:
        folder = home / "policies"
        folder.mkdir()
        if source:
            (folder / f"{policy}.toml").write_text(source, encoding="utf-8")
        program = str(Path(sys.executable).with_name("newel"))
        settings = {
            "HOME": str(home),
            "CONFIG": str(home / "none.toml"),
            "POLICIES": str(folder),
            "DEFAULT_POLICY": policy,
            "PORT": str(port),
            "ADMIN__PORT": str(free_port()),
            "LOG_LEVEL": "warning",
            "ENGINE__URL": f"http://127.0.0.1:{engine}/v1",
            "ENGINE__MODEL": "fake",
            "ADMISSION__IN_FLIGHT": "1024",
        }
        env = {f"NEWEL_{name}": value for name, value in settings.items()} | {"PYTHONPATH": str(ROOT)}

        def key() -> str:
            command, full = [program, "keys", "create"], os.environ | env
            made = subprocess.run(command, env=full, cwd=home, capture_output=True, check=True, text=True)
            return made.stdout.strip()

        return Started([program, "serve"], env, key=key)

    return prepare


def litellm(home: Path, port: int, engine: int, cache: Path) -> Started:
    place = cache / "litellm"
    package = f"litellm[proxy]=={LITELLM_VERSION}"
    venv = [sys.executable, "-m", "venv", "--clear", str(place)]
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries=1", package]
    installed(place, package, venv, pip)
    (home / "config.yaml").write_text(LITELLM.format(engine=engine, key=LITELLM_KEY))
    command = [str(place / "bin" / "litellm"), "--config", str(home / "config.yaml"), "--host", "127.0.0.1"]
    env = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "NO_DOCS": "true",
    }
    return Started(
        [*command, "--port", str(port), "--num_workers", "1"],
        env,
        {"authorization": "Bearer sk-e1b7c04d9a52f6380c4d7be9215fa863"},
    )


def portkey(home: Path, port: int, engine: int, cache: Path) -> Started:
    place = cache / "portkey"
    npm, node = shutil.which("npm"), shutil.which("node")
    if not (npm and node):
        raise Missing("node and npm are not on this machine")
    package = f"@portkey-ai/gateway@{PORTKEY_VERSION}"
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--prefix", str(place)]
    installed(place, package, [npm, "install", *quiet, package])
    program = place / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    headers = {
        "authorization": "Bearer none",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{engine}/v1",
    }
    env = {"HOME": str(home), "NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    return Started([node, str(program), f"--port={port}", "--headless"], env, headers)


def installed(place: Path, what: str, *calls: list[str]) -> None:
    """Makes a peer's folder unless it is there with this version; raises Missing with the installer's reason."""
    done = place / "installed.json"
    if done.is_file() and json.loads(done.read_text()) == what:
        return
    print(f"installing {what} in {place}; the first time only", file=sys.stderr, flush=True)
    place.mkdir(parents=True, exist_ok=True)
    for call in calls:
        result = subprocess.run(call, capture_output=True, text=True, check=False, cwd=place)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "err" in line.lower()] or ["it failed"]
            raise Missing(f"not installed: {lines[-1][:200]}")
    done.write_text(json.dumps(what))


LITELLM_VERSION, PORTKEY_VERSION = "1.108.7", "1.15.2"
STORED = "SQLite, each turn stored, 1,024 requests at once"
WAYS: Mapping[str, Way] = {
    "direct": Way("direct", "the engine itself", None),
    "nginx": Way("nginx", "`proxy_pass`, one worker, keep-alive both ways", nginx),
    "floor": Way("ASGI floor", "30 lines of raw ASGI under uvicorn, aiohttp's client, nothing read", floor),
    "rules": Way("newel, rules", f"policy `base` without its two encoder rules; {STORED}", newel("rules", rules())),
    "open": Way("newel, guards off", f"a policy without rules; {STORED}", newel("open", OPEN)),
    "base": Way("newel, base", f"policy `base` as it ships, with the encoder; {STORED}", newel("base")),
    "litellm": Way("LiteLLM", f"{LITELLM_VERSION}, proxy, one worker, `LITELLM_MODE=PRODUCTION`, no database", litellm),
    "portkey": Way("Portkey", f"npm `@portkey-ai/gateway@{PORTKEY_VERSION}`, headless", portkey),
}
