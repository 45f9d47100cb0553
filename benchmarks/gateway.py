"""newel beside other gateways: requests per second, CPU per request and per frame, added latency, stalls, memory.

All in one run, with `wrk` and a stream client on one core and the gateway alone on the other. Peers are installed on
the first run. `--write` puts the section into docs/benchmarks.md and draws docs/gateway-peers.svg. Machines differ and
are shared: compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Run as a file, this folder would come first, and with it another module called `guardrails`.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from benchmarks.gateway_peers.paths import WAYS, Missing, Started, Way, free_port  # noqa: E402
from benchmarks.gateway_peers.report import Figures, Results, picture, put, section  # noqa: E402

HERE = Path(__file__).parent / "gateway_peers"
PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "gateway-peers.svg"
CACHE = Path.home() / ".cache" / "newel" / "peers"
GATEWAY_CORE, LOAD_CORE = "0", "1"
CONNECTIONS = 32
START = 120.0
"""Seconds that a gateway may take to start."""
TICK = os.sysconf("SC_CLK_TCK")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- processes


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and what it has started, ended children included (proc(5))."""
    used = 0
    for one in tree(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            used += sum(map(int, fields[11:15]))
    return used / TICK


def megabytes(pid: int) -> float:
    """Resident memory of a process and what it has started."""
    pages = 0
    for one in tree(pid):
        with suppress(OSError):
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def pinned(core: str, command: Sequence[str]) -> list[str]:
    return ["taskset", "-c", core, *command] if (os.cpu_count() or 1) > 1 else list(command)


@contextmanager
def process(core: str, command: Sequence[str], env: dict[str, str], home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, ended with all that it has started; its output goes to `home`."""
    with (home / "output").open("wb") as output:
        running = subprocess.Popen(
            pinned(core, command), cwd=home, env=os.environ | env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield running
    finally:
        for one in tree(running.pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        running.wait()


@dataclass(slots=True)
class Running:
    """A way that serves."""

    way: Way
    port: int
    headers: dict[str, str]
    pid: int | None
    rows: list[Figures] = field(default_factory=list)
    note: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def signal(self, number: signal.Signals) -> None:
        for one in tree(self.pid) if self.pid else ():
            with suppress(ProcessLookupError):
                os.kill(one, number)


@contextmanager
def awake(one: Running) -> Iterator[None]:
    """This way goes on, for a while."""
    one.signal(signal.SIGCONT)
    time.sleep(0.3)
    try:
        yield
    finally:
        one.signal(signal.SIGSTOP)


def asked(one: Running, body: bytes) -> bytes:
    """The reply to one request; raises OSError."""
    headers = {"content-type": "application/json"} | one.headers
    request = urllib.request.Request(one.url, body, headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        reply: bytes = answer.read()
        return reply


def started(way: Way, engine: int, cache: Path, home: Path, ends: ExitStack) -> Running:
    """The way, once it answers; raises Missing."""
    if way.prepare is None:
        return Running(way, engine, {}, None)
    port = free_port()
    start: Started = way.prepare(home, port, engine, cache)
    tell(f"starting {way.name}")
    running = ends.enter_context(process(GATEWAY_CORE, start.command, start.env, home))
    one = Running(way, port, dict(start.headers), running.pid)
    if start.key:
        _wait(one, running, start)
        one.headers["authorization"] = f"Bearer {start.key()}"
    _answering(one, running, home)
    one.note = _on_streams(one)
    return one


def _on_streams(one: Running) -> str:
    """What is to be said of a way that answers no stream."""
    try:
        asked(one, bodies(1, stream=True, max_tokens=2)[0].encode())
    except urllib.error.HTTPError as error:
        return f"; it answers streams with status {error.code}"
    except OSError as error:
        return f"; it answers no streams ({error})"
    return ""


def _wait(one: Running, running: subprocess.Popen[bytes], start: Started) -> None:
    """Returns when the process listens: keys are made in the database that it makes."""
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{one.port}/readyz", timeout=2):
            return
        if running.poll() is not None:
            return
        time.sleep(0.1)


def _answering(one: Running, running: subprocess.Popen[bytes], home: Path) -> None:
    body = bodies(1)[0].replace("@@@@@@@", "0000000").encode()
    reason, until = "it did not start", time.monotonic() + START
    while time.monotonic() < until and running.poll() is None:
        try:
            if b"choices" in asked(one, body):
                return
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {error.read()[:200].decode(errors='replace')}"
            until = min(until, time.monotonic() + 20)
        except OSError:
            pass
        time.sleep(0.1)
    last = (home / "output").read_text(errors="replace").strip()[-300:].replace("\n", " ")
    raise Missing(f"{reason} {last if 'not start' in reason else ''}".strip())


# --- what is asked


def bodies(many: int, **more: Any) -> list[str]:
    """Requests as JSON, each with seven @ where a running number belongs."""
    topics = ["a raise", "my notice period", "the holiday plan", "a desk", "the train strike", "our budget", "a badge"]
    askers = ["two good years", "the night shift", "a long illness", "the new project", "a move to another city"]
    texts = (
        f"In case @@@@@@@ and after {askers[i % 5]}: how do I ask about {topics[i % 7]}, and in which order ({i})?"
        for i in range(many)
    )
    limit = {"model": "fake", "max_tokens": 100}
    made = (limit | {"messages": [{"role": "user", "content": text}]} | more for text in texts)
    return [json.dumps(body, separators=(",", ":")) for body in made]


class Load:
    """`wrk` on its core; each run goes on with other numbers."""

    def __init__(self, home: Path):
        if shutil.which("wrk") is None:
            raise SystemExit("wrk is needed (Debian: apt-get install wrk)")
        self._bodies, self._number = home / "bodies", 0
        self._bodies.write_text("\n".join(bodies(400)) + "\n")

    def run(self, one: Running, connections: int, seconds: float) -> dict[str, float]:
        """What wrk counted: requests, seconds, p50 and p99 in ms, bad."""
        self._number += 1_000_003
        env = {
            "BODIES": str(self._bodies),
            "NUMBER": str(self._number),
            "HEADERS": "".join(f"{name}={value}\n" for name, value in one.headers.items()),
        }
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(seconds, 1):.0f}s", "--timeout", "30s"]
        command += ["-s", str(HERE / "load.lua"), one.url]
        done = subprocess.run(
            pinned(LOAD_CORE, command), env=os.environ | env, capture_output=True, text=True, check=True
        )
        found: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        return found


# --- measuring


def measured(one: Running, load: Load, seconds: float) -> Figures:
    """Whole replies, one round."""
    with awake(one):
        load.run(one, CONNECTIONS, 1)
        before = cpu_seconds(one.pid) if one.pid else 0.0
        busy = load.run(one, CONNECTIONS, seconds)
        used = (cpu_seconds(one.pid) if one.pid else 0.0) - before
        calm = load.run(one, 1, seconds)
        rss = megabytes(one.pid) if one.pid else 0.0
    return {
        "requests": busy["requests"] / busy["seconds"],
        "cpu": used / max(busy["requests"], 1) * 1e6,
        "p50": calm["p50"],
        "p99": calm["p99"],
        "bad": busy["bad"] + calm["bad"],
        "rss": rss,
    }


def streamed(one: Running, streams: int, seconds: float, start: float) -> Figures:
    """Many streams that begin within `start` seconds, one round."""
    body = bodies(1, stream=True)[0]
    body = body.replace('"max_tokens":100', f'"max_tokens":{int(50 * (seconds + start + 5))}')
    asked: dict[str, Any] = {"url": one.url, "headers": one.headers, "body": body}
    asked |= {"streams": streams, "seconds": seconds, "start": start}
    command = pinned(LOAD_CORE, [sys.executable, str(HERE / "streams.py"), json.dumps(asked)])
    with awake(one), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        client.stdout.readline()
        before = cpu_seconds(one.pid) if one.pid else 0.0
        time.sleep(seconds)
        used = (cpu_seconds(one.pid) if one.pid else 0.0) - before
        rss = megabytes(one.pid) if one.pid else 0.0
        told = json.loads(client.stdout.readline())
        client.wait()
        time.sleep(1)
    return {
        "frames": told["frames"] / told["seconds"],
        "tokens": told["tokens"] / told["seconds"],
        "frame_cpu": used / max(told["frames"], 1) * 1e6,
        "gap50": told["p50"],
        "gap99": told["p99"],
        "pause": told["pause"],
        "ttft50": told["ttft50"],
        "ttft99": told["ttft99"],
        "ttft": told["ttft"],
        "stalls": told["stalls"],
        "stream_bad": told["bad"],
        "stream_rss": rss,
    }


def medians(rows: Sequence[Figures]) -> Figures:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def flat(one: Running, load: Load, minutes: int) -> list[float]:
    """MB before, and after each minute of whole replies and some streams."""
    with awake(one):
        found = [megabytes(one.pid or 0)]
        for minute in range(1, minutes + 1):
            load.run(one, 8, 59)
            found.append(megabytes(one.pid or 0))
            tell(f"minute {minute}: {found[-1]:.0f} MB")
    return found


def shown(one: Running, row: Figures) -> str:
    return f"{one.way.name:<18}" + " ".join(f"{name} {value:,.1f}" for name, value in row.items())


def run(names: Sequence[str], options: argparse.Namespace) -> Results:
    """Everything, in one run."""
    results = Results()
    with ExitStack() as ends:
        home = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="newel-bench-")))
        home.chmod(0o755)
        engine = free_port()
        (home / "engine").mkdir()
        command = [sys.executable, str(HERE / "upstream.py"), str(engine)]
        above = ends.enter_context(process(LOAD_CORE, command, {}, home / "engine"))
        _answering(Running(WAYS["direct"], engine, {}, None), above, home / "engine")
        running: list[Running] = []
        for name in names:
            place = home / name
            place.mkdir()
            try:
                one = started(WAYS[name], engine, options.cache, place, ends)
            except Missing as error:
                results.missing[WAYS[name].name] = str(error)
                tell(f"{name}: {error}")
                continue
            one.signal(signal.SIGSTOP)
            running.append(one)
            results.about[one.way.name] = one.way.how + one.note
        _rounds(running, Load(home), options, results)
    return results


def _rounds(running: Sequence[Running], load: Load, options: argparse.Namespace, results: Results) -> None:
    for number in range(options.rounds):
        for one in running:
            row = measured(one, load, options.seconds)
            if options.streams:
                row |= streamed(one, options.streams, options.seconds, options.start)
            one.rows.append(row)
            tell(f"round {number + 1}: {shown(one, row)}")
    results.figures = {one.way.name: medians(one.rows) for one in running}
    if options.minutes and (own := next((one for one in running if one.way.name == "newel, rules"), None)):
        results.memory, results.memory_of = flat(own, load, options.minutes), own.way.name


def main() -> None:
    """Runs everything and prints the section; `--write` puts it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {','.join(WAYS)}; direct is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--streams", type=int, default=500, help="streams at once; 0 leaves them out")
    parser.add_argument("--start", type=float, default=1.0, help="seconds in which the streams begin; 0: all at once")
    parser.add_argument("--minutes", type=int, default=0, help="of load under which newel's memory is watched")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the peers are installed ({CACHE})")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and docs/gateway-peers.svg")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no gateway is left behind
    names = list(dict.fromkeys(["direct", *options.ways.split(",")]))
    if unknown := [name for name in names if name not in WAYS]:
        raise SystemExit(f"--ways: no way {unknown[0]!r}; there are {', '.join(WAYS)}")
    results = run(names, options)
    text = section(results, options.streams, options.rounds, options.seconds, PICTURE.name, options.start)
    print(text)
    if options.write:
        put(text, PAGE)
        PICTURE.write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
