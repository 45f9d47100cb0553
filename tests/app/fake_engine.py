"""A fake inference engine: `python fake_engine.py --port N --model DIR ... [--slow S] [--crash-unless FILE] ...`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--crash-unless", "--children", "--refuse", "--mute-when"):
    parser.add_argument(name, default="")
parser.add_argument("--port", type=int)
parser.add_argument("--slow", type=float, default=0.0, help="seconds before it listens")
parser.add_argument("--noisy", type=int, default=0, help="bytes printed at the start")
parser.add_argument("--stubborn", action="store_true", help="ignores SIGTERM")
args = parser.parse_args([a for a in sys.argv[1:] if a not in ("-m", "alignment.serve")])
KEY = os.environ["NEWEL_ENGINE_API_KEY"]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if args.mute_when and Path(args.mute_when).exists():
            time.sleep(60)
        self.reply(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.reply(401, {"error": {"message": "wrong key"}})
        if args.refuse:
            return self.reply(int(args.refuse), {"error": {"message": "no chat template"}})
        return self.reply(200, {"choices": [{"message": {"role": "assistant", "content": "Hi"}}]})

    def reply(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


if args.stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if args.children:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    Path(args.children).write_text(f"{os.getpid()} {child.pid}")
print("x" * args.noisy, flush=True)
if args.crash_unless and not Path(args.crash_unless).exists():
    sys.exit("CUDA out of memory, says the fake")
time.sleep(args.slow)
print("listening on", args.port, flush=True)
ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
