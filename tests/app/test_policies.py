"""The book of live policies: where they come from, what changes them, and what leaves them as they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex

import pytest

from app.errors import ApiError
from app.policies import PolicyBook
from app.store import Store, StoreDown
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

    monkeypatch.setattr(Store, "active_policy", down)
    await policies.refresh()
    assert await policies.of(name) is live
    with pytest.raises(StoreDown):  # the folder's may be laxer than the one that was activated
        await policies.of(f"{name}-other")


async def test_a_policy_is_put_checked_and_live(store: Store, tmp_path: Path, name: str) -> None:
    policies = book(store, tmp_path)
    policy, report = await policies.put(source(name, RULE), "dana", True, None)
    assert report.passed and await policies.of(name) is policy
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
    _, report = await policies.put(bad, "dana", False, None)
    assert not report.passed
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
    _, report = await policies.put(source(name, GRADED), "dana", True, Grader())
    assert report.passed and len(asked) >= 2 and report.unchecked == ()
    _, report = await policies.put(source(name, GRADED), "dana", True, None)
    assert report.unchecked == ("graded",)
