"""The book of live policies: where they come from, what changes them, and what leaves them as they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex

import pytest

from app.errors import ApiError
from app.metrics import Metrics
from app.policies import PolicyBook
from app.store import NotFound, Store, StoreDown
from guardrails.policy import loads
from guardrails.types import Message

RULE = """
[[input]]
name = "no"
validator = "patterns"
patterns = ['forbidden']
action = "refuse"
reply = "No."

[[example]]
ask = "That is forbidden."
expect = "refuse"

[[example]]
ask = "Hello"
expect = "allow"
"""
GRADED = """
[[input]]
name = "graded"
validator = "grader"
question = "Is this text about the weather?"
action = "refuse"
reply = "No weather."

[[example]]
ask = "It rains."
expect = "refuse"
rule = "graded"

[[example]]
ask = "Hello"
expect = "allow"
"""


@pytest.fixture
def name() -> str:
    """The name of a policy that no other test has."""
    return f"policy-{token_hex(4)}"


def source(name: str, rules: str = "", persona: str = "Be kind.") -> str:
    return f'name = "{name}"\npersona = "{persona}"\n{rules}'


def book(store: Store, folder: Path, *sources: str) -> PolicyBook:
    for text in sources:
        (folder / f"{loads(text).name}.toml").write_text(text)
    return PolicyBook(store, [folder])


async def activate(store: Store, text: str, version: str = "") -> None:
    version = version or loads(text).version
    name = text.split('"')[1]
    await store.put_policy(name, text, version, "test")
    await store.activate_policy(name, version, "test")


async def test_a_policy_comes_from_the_folder_until_one_is_activated(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path, source(name))
    assert (await policies.of(name)).persona == "Be kind."
    await activate(store, source(name, persona="Be brief."))
    assert (await policies.of(name)).persona == "Be kind.", "nothing changes between two looks"
    await policies.refresh()
    assert (await policies.of(name)).persona == "Be brief."
    assert (await book(store, tmp_path).of(name)).persona == "Be brief."


async def test_the_same_value_is_given_until_it_changes(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path, source(name))
    first = await policies.of(name)
    await policies.refresh()
    assert await policies.of(name) is first


async def test_a_policy_is_looked_at_once_though_what_it_extends_has_changed(
    store: Store, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version then differs from the one that was stored."""
    policies = book(store, tmp_path, source(f"{name}-base", RULE))
    child = f'name = "{name}"\nextends = "{name}-base"\n'
    await activate(store, child, loads(child, folders=[tmp_path]).version)
    (tmp_path / f"{name}-base.toml").write_text(source(f"{name}-base", RULE, "Another."))
    live = await policies.of(name)
    assert live.persona == "Another."
    await policies.refresh()
    assert await policies.of(name) is live


async def test_a_bad_version_leaves_the_old_one_and_a_good_one_takes_its_place(
    store: Store, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    policies = book(store, tmp_path, source(name))
    await policies.of(name)
    await activate(store, f'name = "{name}"\nrules = 3\n', "bad")
    for _ in range(3):
        await policies.refresh()
    assert (await policies.of(name)).persona == "Be kind."
    (told,) = [record for record in caplog.records if record.message == "policy_not_loaded"]
    assert f"{name}@bad:2:" in str(told.__dict__["fields"]["problems"])
    await activate(store, source(name, persona="Be brief."))
    await policies.refresh()
    assert (await policies.of(name)).persona == "Be brief."


async def test_without_a_policy_that_loads_nothing_is_served(store: Store, tmp_path: Path, name: str) -> None:
    for text in ("", "name = 3"):
        (tmp_path / f"{name}.toml").write_text(text)
        with pytest.raises(ApiError) as caught:
            await PolicyBook(store, [tmp_path]).of(name)
        assert (caught.value.status, caught.value.code) == (503, "policy_unavailable")


async def test_while_the_database_is_down_the_live_policy_stays_and_a_new_one_is_not_guessed(
    store: Store, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = book(store, tmp_path, source(name), source(f"{name}-other"))
    live = await policies.of(name)

    async def down(*args: object) -> None:
        raise StoreDown("away")

    monkeypatch.setattr(Store, "active_versions", down)
    await policies.refresh()
    assert await policies.of(name) is live
    with pytest.raises(StoreDown):  # the folder's may be laxer than the one that was activated
        await policies.of(f"{name}-other")


async def test_a_policy_is_put_checked_and_live(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path)
    put = await policies.put(source(name, RULE), "dana", True, None)
    policy = put.policy
    assert put.report.passed and put.left_behind == {} and await policies.of(name) is policy
    (stored,) = await store.policies(name)
    assert (stored.version, stored.active, stored.created_by) == (policy.version, True, "dana")
    await policies.refresh()
    assert await policies.of(name) is policy


async def test_a_policy_that_is_only_stored_may_fail_its_check(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path, source(name))
    bad = source(name, RULE.replace("That is forbidden.", "Hello there"))
    with pytest.raises(ApiError) as caught:
        await policies.put(bad, "dana", True, None)
    assert caught.value.code == "policy_check_failed" and "policy.toml:11:" in caught.value.message
    assert await store.policies(name) == []
    assert not (await policies.put(bad, "dana", False, None)).report.passed
    assert [version.active for version in await store.policies(name)] == [False]
    assert (await policies.of(name)).input == ()


async def test_every_problem_of_a_policy_is_told_with_its_line(store: Store, tmp_path: Path, name: str) -> None:
    text = source(name, RULE.replace("reply", "replay").replace("forbidden']", "(']"))
    with pytest.raises(ApiError) as caught:
        await book(store, tmp_path).put(text, "dana", True, None)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_policy", "source")
    lines = caught.value.message.splitlines()
    assert len(lines) >= 2 and all(line.startswith("policy.toml:") for line in lines)


async def test_a_check_asks_the_grader_in_its_own_loop(store: Store, tmp_path: Path, name: str) -> None:
    here, asked = asyncio.get_running_loop(), []

    class Grader:
        async def probability(self, messages: Sequence[Message]) -> float:
            assert asyncio.get_running_loop() is here and threading.current_thread() is threading.main_thread()
            asked.append(messages[-1].content)
            return 0.9 if "rains" in messages[-1].content else 0.1

    policies = book(store, tmp_path)
    report = (await policies.put(source(name, GRADED), "dana", True, Grader())).report
    assert report.passed and len(asked) >= 2 and report.unchecked == ()
    report = (await policies.put(source(name, GRADED), "dana", True, None)).report
    assert report.unchecked == ("graded",)


# --- policies that extend others


def child(name: str, more: str = "") -> str:
    return f'name = "{name}-child"\nextends = "{name}"\n{more}'


def stale(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value("newel_policy_stale", {"policy": name})


async def test_a_parent_comes_from_the_store_and_its_children_follow_it(
    store: Store, tmp_path: Path, name: str
) -> None:
    """The children may be stored or not, and may be grandchildren."""
    grandchild = f'name = "{name}-grandchild"\nextends = "{name}-child"\n'
    policies = book(store, tmp_path, source(name, RULE))
    (tmp_path / f"{name}-child.toml").write_text(child(name))
    await activate(store, grandchild, "1")
    first = [await policies.of(one) for one in (name, f"{name}-child", f"{name}-grandchild")]
    assert {policy.persona for policy in first} == {"Be kind."}
    await activate(store, source(name, RULE, "Be brief."))
    await policies.refresh()
    after = [await policies.of(one) for one in (name, f"{name}-child", f"{name}-grandchild")]
    assert {policy.persona for policy in after} == {"Be brief."}
    assert all(one.version != other.version for one, other in zip(first, after, strict=True))
    await policies.refresh()
    assert await policies.of(f"{name}-grandchild") is after[2]


async def test_a_policy_that_is_not_concerned_stays_the_same_value(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path, source(name), source(f"{name}-other"))
    other = await policies.of(f"{name}-other")
    await activate(store, source(name, persona="Be brief."))
    await policies.refresh()
    assert await policies.of(f"{name}-other") is other


@pytest.mark.parametrize(
    ("parent", "problem"),
    [
        (RULE.replace('"no"', '"nay"'), "no policy that is extended has a rule of this name"),
        (RULE.replace("[[example]]", "threshold = 0.5\nlocked = true\n[[example]]", 1), "is locked ("),
        (RULE.replace("forbidden'", "prohibited'").replace("is forbidden", "is prohibited"), "expected refuse"),
    ],
    ids=["it is gone", "it is locked now", "an example fails"],
)
async def test_a_child_that_cannot_follow_its_parent_stays_as_it_was_and_says_so(
    store: Store, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, parent: str, problem: str
) -> None:
    metrics = Metrics()
    (tmp_path / f"{name}.toml").write_text(source(name, RULE))
    example = '[[example]]\nask = "It is forbidden!"\nexpect = "refuse"\nrule = "no"\n'
    more = f'[[input]]\nname = "no"\nmode = "enforce"\nthreshold = 0.6\n{example}'
    await activate(store, child(name, more), "1")
    policies = PolicyBook(store, [tmp_path], metrics)
    before = await policies.of(f"{name}-child")
    assert stale(metrics, f"{name}-child") == 0
    await policies.of(name)
    await activate(store, source(name, parent))
    for _ in range(3):
        await policies.refresh()
    assert await policies.of(f"{name}-child") is before
    assert (await policies.of(name)).version != loads(source(name, RULE)).version, "the parent itself is new"
    (told,) = [record for record in caplog.records if record.message == "policy_not_loaded"]
    fields = told.__dict__["fields"]
    assert (fields["policy"], fields["kept"]) == (f"{name}-child", before.id)
    assert problem in str(fields["problems"])
    assert stale(metrics, f"{name}-child") == 1
    await activate(store, source(name, RULE, "Be brief."))
    await policies.refresh()
    assert (await policies.of(f"{name}-child")).persona == "Be brief."
    assert stale(metrics, f"{name}-child") == 0


async def test_who_puts_a_parent_is_told_which_children_cannot_follow(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path, source(name, RULE))
    await activate(store, child(name, '[[input]]\nname = "no"\nthreshold = 0.4\n'), "1")
    assert (await policies.put(source(name, RULE, "Be brief."), "dana", True, None)).left_behind == {}
    put = await policies.put(source(name, RULE.replace('"no"', '"nay"')), "dana", True, None)
    assert list(put.left_behind) == [f"{name}-child"]
    assert "no policy that is extended has a rule of this name" in put.left_behind[f"{name}-child"][0]


async def test_a_draft_is_made_live_by_the_start_of_its_version_and_taken_back(
    store: Store, tmp_path: Path, name: str
) -> None:
    policies = book(store, tmp_path)
    one, two, three = (source(name, RULE, persona) for persona in ("One.", "Two.", "Three."))
    for text in (one, two, three):
        await policies.put(text, "dana", False, None)
    states = {version.version: version.state for version in await store.policies(name)}
    assert set(states.values()) == {"draft"} and len(states) == 3
    for text in (one, three):
        await policies.activate(name, loads(text).version[:6], "dana", None)
        assert (await policies.of(name)).persona == loads(text).persona
    states = {version.version: version.state for version in await store.policies(name)}
    assert [states[loads(text).version] for text in (one, two, three)] == ["retired", "draft", "active"]
    back = await policies.roll_back(name, "", "dana", None)
    assert back.policy.persona == "One.", "a draft was never live, so nobody goes back to it"
    with pytest.raises(NotFound, match="was ever live"):
        await policies.roll_back(name, "", "dana", None)
    with pytest.raises(NotFound, match="no version of policy"):
        await policies.activate(name, "xyz", "dana", None)
    actions = [entry.action for entry in await store.audit_log() if name in entry.subject]
    assert actions == ["policy.rollback", *["policy.activate"] * 2, *["policy.put"] * 3]
