"""What is promised about the project as a whole: the wheel, the settings' page, what the gateway never imports."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement
from pydantic import BaseModel

from app.settings import GuardModelSettings, ModelSettings, PoolEngineSettings, PoolSettings, Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("app", "guardrails", "alignment")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXAMPLE = (ROOT / "deploy" / "newel.toml").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("newel-*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_every_file_of_the_packages_is_in_the_wheel(wheel: set[str]) -> None:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    ours = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert ours - wheel == set()
    assert {"guardrails/policies/base.toml", "guardrails/policies/hr.toml"} <= ours
    assert any(name.startswith("app/store/migrations/versions/") for name in ours)


def test_nothing_but_the_packages_is_in_the_wheel(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {*PACKAGES, f"newel-{PROJECT['version']}.dist-info"}


def test_the_version_is_written_in_one_place() -> None:
    assert importlib.metadata.version("newel") == PROJECT["version"]
    literal = re.compile(rf"""["']{re.escape(PROJECT["version"])}["']""")
    copies = [
        path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if literal.search(path.read_text())
    ]
    assert copies == []


@pytest.mark.parametrize("module", ["app.main", "app.cli", "guardrails"])
def test_the_engines_libraries_are_not_imported_by(module: str) -> None:
    assert _imported_by(module) & {"accelerate", "torch", "transformers", "vllm"} == set()


def test_the_guardrails_import_no_web_framework_no_database_and_no_http_client() -> None:
    assert _imported_by("guardrails") & {"aiohttp", "fastapi", "sqlalchemy", "starlette"} == set()


def _imported_by(module: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_example_file_as_it_stands_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(table == {} for table in tomllib.loads(EXAMPLE).values())
    monkeypatch.setenv("NEWEL_CONFIG", str(ROOT / "deploy" / "newel.toml"))
    with_file = Settings()
    monkeypatch.setenv("NEWEL_CONFIG", "/nowhere.toml")
    assert with_file == Settings()


def test_every_setting_and_nothing_else_is_in_the_example_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncommented = _uncommented()
    assert set(_keys(tomllib.loads(uncommented))) == set(_fields(Settings))
    (tmp_path / "newel.toml").write_text(uncommented)
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    assert Settings().engine.args == ["--max-model-len", "8192"]


def test_the_example_file_gives_the_true_defaults() -> None:
    examples = {"home", "database", "policies", "engine.url", "engine.api_key", "engine.python", "engine.args"}
    examples |= {"secret", "webhook.url", "webhook.secret", "vault.secret", "vault.old_secrets"}
    examples |= {"admin.port", *(f"auth.oidc.{key}" for key in ("issuer", "audience", "jwks_url"))}
    examples |= {"auth.oidc.tenants", "auth.oidc.scopes", "limits.redis_url"}
    examples |= {f"guard_models.qwen.{key}" for key in ("url", "model", "kind", "api_key")}
    uncommented = tomllib.loads(_uncommented())
    examples |= {f"pools.qwen.{key}_timeout" for key in ("first_token", "idle", "total")} | {"pools.qwen.in_flight"}
    examples |= {f"pools.qwen.engines.qwen.{key}" for key in ("url", "api_key")}
    examples |= {f"models.qwen.{key}" for key in ("pool", "model")}
    examples |= {f"models.qwen.{kind}.{key}" for kind in ("canary", "shadow") for key in ("pool", "model")}
    pool = PoolSettings.model_construct(engines={"qwen": PoolEngineSettings.model_construct()})
    defaults = Settings.model_construct(
        guard_models={"qwen": GuardModelSettings.model_construct()},
        pools={"qwen": pool},
        models={"qwen": ModelSettings.model_construct()},
    )
    said = {key: value for key, value in _values(uncommented) if key not in examples}
    assert said == {key: _attribute(defaults, key) for key in said}


def _uncommented() -> str:
    """The example file with everything in it that stands in comments."""
    return re.sub(r"(?m)^# (?=\w+ = |\[\w+\.\w+\]$)", "", EXAMPLE)


def _keys(table: Mapping[str, object]) -> Iterator[str]:
    return (key for key, _ in _values(table))


def _values(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        elif named := [
            one for one in get_args(field.annotation) if isinstance(one, type) and issubclass(one, BaseModel)
        ]:
            yield from _fields(named[0], f"{prefix}{name}.qwen.")
        else:
            yield prefix + name


def _attribute(model: object, path: str) -> object:
    for name in path.split("."):
        model = model[name] if isinstance(model, dict) else getattr(model, name)
    return model


def test_every_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    lines = (line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins: dict[str, set[str]] = {}
    for name, version in (line.split("==") for line in lines if "==" in line):
        pins.setdefault(name, set()).add(version)
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["train"], *extras["postgres"], *extras["dev"]]
    for requirement in map(Requirement, wanted):
        versions = pins.get(requirement.name, set())
        assert versions, f"{requirement.name} is not in constraints.txt: run `make lock`"
        assert all(requirement.specifier.contains(version) for version in versions), requirement
