import re
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from guardrails import Action, PolicyError, catalog, judge, loads
from guardrails.spans import PatternError
from guardrails.types import Context, Validator

DOCS = Path(__file__).parents[2] / "docs" / "validators.md"
LEAST: dict[str, dict[str, object]] = {
    "disclaimer": {"text": "This is no advice."},
    "json_schema": {"shape": {"type": "object"}},
    "keywords": {"words": ["salary"]},
    "mentions": {"names": [{"name": "Acme"}]},
    "tool_calls": {"tools": []},
    "grader": {"question": "Is this rude?"},
    "guard_model": {"kind": "plain", "question": "Is this rude?"},
    "language": {"allow": ["en"]},
    "length": {"max_chars": 9},
    "patterns": {"patterns": ["x"]},
    "scope": {"topics": {"pay": ["What does my colleague earn?"]}},
    "topics": {"topics": [{"name": "pay", "words": ["salary"]}]},
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with one entry point of the group `newel.validators` on the path, as an installer would."""

    def write(point: str, code: str = "", module: str = "acme_badges") -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[newel.validators]\n{point}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    catalog.plugins.cache_clear()
    yield write
    catalog.plugins.cache_clear()
    for module in ("acme_badges", "other_badges"):
        sys.modules.pop(module, None)


@pytest.fixture
def example() -> str:
    """The plug-in that docs/validators.md shows."""
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]


@pytest.mark.parametrize("name", [name for name in catalog.BUILT_IN if name != "presidio"])  # an extra
@pytest.mark.usefixtures("encoder_files")
def test_every_validator_can_be_built_of_its_least_options(name):
    options = catalog.options(name).model_validate(LEAST.get(name, {}))
    assert isinstance(catalog.build(name, options), Validator)


@pytest.mark.parametrize("name", catalog.BUILT_IN)
def test_options_refuse_what_they_do_not_know_and_describe_what_they_know(name):
    model = catalog.options(name)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate({**LEAST.get(name, {}), "patern": "x"})
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize("name", catalog.BUILT_IN)
def test_options_do_not_take_the_keys_of_a_rule(name):
    rule = {"name", "validator", "action", "reply", "route", "scope", "threshold", "placeholder", "if_broken", "mode"}
    assert not (rule | {"budget"}) & catalog.options(name).model_fields.keys()


@pytest.mark.parametrize("name", catalog.BUILT_IN)
def test_the_page_names_every_validator_its_options_and_its_labels(name):
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    model = catalog.options(name)
    labels = [
        label for field in ("kinds", "families") for label in (field in model.model_fields and _labels(model)) or []
    ]
    assert [word for word in (*model.model_fields, *labels) if f"`{word}`" not in row] == []


def _labels(model: type[BaseModel]) -> list[str]:
    """The values that the list of kinds or families may have."""
    (definition,) = [one for one in model.model_json_schema()["properties"].values() if "enum" in one.get("items", {})]
    return definition["items"]["enum"]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(catalog.CatalogError, match="there is no validator 'persona'; there are: code, disclaimer"):
        catalog.options("persona")


def test_a_value_that_cannot_be_used_is_refused_with_the_reason():
    with pytest.raises(PatternError, match="number 1"):
        catalog.build("patterns", catalog.options("patterns").model_validate({"patterns": ["("]}))


async def test_the_ten_lines_of_the_page_are_a_validator(install, example):
    install("badge = acme_badges", example)
    assert len([line for line in example.splitlines() if line]) <= 10
    assert catalog.names() == sorted([*catalog.BUILT_IN, "badge"])
    validator = catalog.build("badge", catalog.options("badge").model_validate({"site": "B"}))
    text = "Badge B-12345, not C-12345"
    assert [text[one.start : one.end] for one in await validator.find(text, Context())] == ["B-12345"]


BADGES = """
name = "badges"

[[output]]
name = "no-badges"
validator = "badge"
site = "B"
action = "redact"
placeholder = "(a badge)"

[[example]]
answer = "Badge B-12345, not C-12345."
expect = "redact"
rule = "no-badges"
becomes = "Badge (a badge), not C-12345."

[[example]]
answer = "Show your badge."
expect = "allow"
"""


async def test_the_ten_lines_of_the_page_work_in_a_policy(install, example):
    install("badge = acme_badges", example)
    policy = loads(BADGES)
    (shown, spared) = policy.examples
    assert (await judge(policy.output, shown.text)).text == shown.becomes
    assert (await judge(policy.output, spared.text)).action is Action.ALLOW
    with pytest.raises(PolicyError, match="sight"):
        loads(BADGES.replace("site =", "sight ="))


def test_a_package_is_not_imported_before_its_validator_is_asked_for(install, example):
    install("badge = acme_badges", example)
    assert "badge" in catalog.names()
    assert "acme_badges" not in sys.modules
    catalog.options("badge")
    assert "acme_badges" in sys.modules


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import acme_nothing", "cannot be imported: ModuleNotFoundError: No module named 'acme_nothing'"),
        ("raise KeyError('boom')", "cannot be imported: KeyError: 'boom'"),
        ("def build(options): ...", "has no `Options`, a pydantic model"),
        ("class Options: ...\ndef build(options): ...", "has no `Options`, a pydantic model"),
        ("from pydantic import BaseModel\nclass Options(BaseModel): ...", "has no `build` function"),
    ],
)
def test_a_broken_package_is_named_with_what_is_wrong(install, code, message):
    install("badge = acme_badges", code)
    assert "badge" in catalog.names()
    with pytest.raises(catalog.CatalogError, match=f"validator 'badge' of acme-badges 1.2 {re.escape(message)}"):
        catalog.options("badge")


def test_a_package_cannot_take_the_name_of_a_built_in_validator(install):
    install("personal = acme_badges")
    with pytest.raises(
        catalog.CatalogError, match=r"'personal' of acme-badges 1\.2 has the name of one of newel itself"
    ):
        catalog.names()


def test_two_packages_cannot_share_a_name(install):
    install("badge = acme_badges")
    install("badge = other_badges", module="other_badges")
    with pytest.raises(
        catalog.CatalogError, match=r"'badge' of \w+-badges 1\.2 has the name of one of \w+-badges 1\.2"
    ):
        catalog.names()
