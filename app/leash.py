"""Holds an engine: starts a command and lets none of its processes outlive whoever started it. Standard library only.

`python -I leash.py GRACE COMMAND...`. The holder keeps our standard input open and never writes to it. When it closes,
by will or because the holder died in whatever way, the command gets SIGTERM, and after GRACE seconds all that is left
of it SIGKILL: its process group, and on Linux every process that it started, wherever those put themselves. Our exit
status is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str]) -> int:
    """Returns the command's exit status (128 + n for signal n), or 0 when it was stopped because the holder let go."""
    grace, command = float(argv[0]), argv[1:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    asked: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    while child.poll() is None and not asked:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready:
            os.read(ended, 64)
        if 0 in ready and not os.read(0, 64):
            asked.append(1)
    stopped = child.poll() is None
    if stopped:
        _stop(child, grace)
    _kill_rest(child.pid)
    return 0 if stopped else 128 - child.returncode if child.returncode < 0 else child.returncode


def _stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """Asks the command to end, and waits for it that many seconds."""
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace)


def _kill_rest(group: int) -> None:
    """Kills the group, then, as orphans come to us, every other process that the command started."""
    for _ in range(50):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        left = _children()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(0.02)


def _children() -> list[int]:
    """Returns our child processes (on Linux; elsewhere none are known beyond the group)."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _die_with_parent() -> None:
    """Has the system kill the command when we are killed ourselves (runs in the child, before the command)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
