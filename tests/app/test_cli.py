"""The command line: what each command does, prints and exits with."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import typer.main
from typer.cli import get_docs_for_click

from app.cli import app, main
from app.export import scrubber
from app.records import Tenant, Turn
from app.store import Store
from guardrails.types import ToolMessage
from tests.app.turns import RAW, SECRET, begun, escalated, finished, opinion
from tests.fakes import FakeUpstream

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
DOCS = "python -m typer app.cli utils docs --name newel --output docs/cli.md"
POLICY = """
name = "office"
persona = "You help people at work."

[[input]]
name = "falcon"
validator = "patterns"
patterns = ['project falcon']
action = "refuse"
reply = "{reply}"

[[example]]
ask = "When does project falcon start?"
expect = "{expect}"
rule = "falcon"

[[example]]
ask = "When do falcons breed?"
expect = "allow"
"""
GRADED = """
name = "graded"
persona = "You help people at work."

[[input]]
name = "medical"
validator = "grader"
question = "Does the message ask for medical advice?"
action = "refuse"
reply = "Please ask a doctor."

[[example]]
ask = "Which pill helps against my headache?"
expect = "refuse"
rule = "medical"

[[example]]
ask = "How do I ask for a raise?"
expect = "allow"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no settings but that."""
    for name in [name for name in os.environ if name.startswith("NEWEL_") and name != "NEWEL_ENCODER"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    monkeypatch.setenv("USER", "ana")
    monkeypatch.setenv("LOGNAME", "ana")
    return tmp_path / "home"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def newel(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: its exit code, what it printed, what it complained."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return run


def stored(home: Path, work: Callable[[Store], Awaitable[T]]) -> T:
    async def run() -> T:
        store = await Store.open(f"sqlite+aiosqlite:///{home / 'newel.db'}", home / "spill")
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def put(home: Path, *turns: Turn) -> None:
    async def work(store: Store) -> None:
        await store.put_tenant(Tenant("acme", "base"))
        for turn in turns:
            await store.finish(turn)

    stored(home, work)


def policy(folder: Path, name: str = "office.toml", reply: str = "Not yet.", expect: str = "refuse") -> str:
    (folder / name).write_text(POLICY.format(reply=reply, expect=expect))
    return str(folder / name)


def commands(group: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        inner = hasattr(command, "commands")
        found += commands(command, f"{prefix}{name} ") if inner else [(f"{prefix}{name}", command)]
    return found


# --- the page and the help


def test_the_page_of_the_commands_is_what_their_help_says() -> None:
    command = typer.main.get_command(app)
    with command.make_context("newel", [], resilient_parsing=True) as context:
        page = get_docs_for_click(obj=command, ctx=context, name="newel")
    assert (ROOT / "docs" / "cli.md").read_text() == f"{page.strip()}\n", f"docs/cli.md is stale: {DOCS}"


def test_every_command_is_there_and_says_in_one_line_what_it_does() -> None:
    found = dict(commands(typer.main.get_command(app)))
    names = """check demo diff export replay serve turn
    | audit head, audit list, audit verify | guard evaluate, guard pull, guard rollback, guard train
    | keys create, keys list, keys revoke, keys show | model pull
    | privacy erase, privacy export, privacy retain, privacy seal
    | policy activate, policy list, policy put, policy rollback, policy schema | tenants list, tenants put
    | tickets answer, tickets close, tickets list, tickets show | vault forget, vault show
    | train dpo, train kto, train ppo, train reward, train sft
    | webhooks list, webhooks retry"""
    single, *groups = names.split("|")
    assert set(found) == {*single.split(), *(name.strip() for group in groups for name in group.split(","))}
    for name, command in found.items():
        assert re.fullmatch(r"[A-Z][^.\n]{5,44}", command.get_short_help_str().rstrip(".")), name


def test_without_a_command_the_help_is_shown(newel: Run) -> None:
    code, out, err = newel()
    assert (code, "Usage: newel" in out + err) == (2, True)


# --- mistakes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("tickets", "list", "--state", "lost"), "'lost' is not one of"),
        (("keys", "create", "--scope", "root"), "'root' is not one of"),
        (("turn", "chatcmpl-1", "--withheld"), "add --reason"),
        (("export",), "Missing argument"),
        (("serve", "--port", "99999"), "there is no port 99999"),
    ],
)
def test_a_wrong_command_line_exits_with_2(newel: Run, args: tuple[str, ...], said: str) -> None:
    code, _, err = newel(*args)
    assert (code, said in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NEWEL_ENGINE__KIND", "quantum", "engine.kind (in newel.toml, or NEWEL_ENGINE__KIND in the environment)"),
        ("NEWEL_PORT", "many", "NEWEL_PORT"),
        ("NEWEL_ENGINE__ARGS", "--flag", "settings: "),
        ("NEWEL_DATABASE", "mysql://db/newel", "use sqlite+aiosqlite or postgresql+psycopg"),
    ],
)
def test_wrong_settings_are_named(
    newel: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    code, _, err = newel("keys", "list")
    assert code == (1 if name == "NEWEL_DATABASE" else 2)
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [("port = ", "is not valid TOML"), ("prot = 8080", "prot"), ("[engine]\nkin = 'cpu'", "engine.kin")],
)
def test_a_wrong_settings_file_is_named(newel: Run, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "newel.toml").write_text(text)
    code, _, err = newel("keys", "list")
    assert (code, said in err, "newel.toml" in err) == (2, True, True), err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("keys", "create", "--tenant", "nobody"), "there is no tenant 'nobody'"),
        (("keys", "revoke", "key_1"), "there is no key 'key_1'"),
        (("tenants", "put", "acme", "--policy", "bsae"), "base"),
        (("tickets", "show", "ESC-1"), "there is no ticket 'ESC-1'"),
        (("tickets", "answer", "ESC-1", "--text", "Yes."), "there is no ticket 'ESC-1'"),
        (("tickets", "close", "ESC-1"), "there is no ticket 'ESC-1'"),
        (("webhooks", "retry", "msg_1"), "there is no delivery 'msg_1'"),
        (("turn", "chatcmpl-1"), "there is no turn 'chatcmpl-1'"),
        (("vault", "show", "chatcmpl-1", "--reason", "a complaint"), "there is no turn 'chatcmpl-1'"),
        (("vault", "forget", "nobody", "--all"), "there is no tenant 'nobody'"),
        (("policy", "rollback", "base"), "nothing to go back from"),
        (("policy", "rollback", "base", "abc"), "no version of policy 'base' starts with 'abc'"),
        (("check", "bsae"), "base"),
        (("check", "base@abc"), "no version of policy 'base' starts with 'abc'"),
        (("diff", "base", "bsae"), "did you mean 'base'?"),
        (("replay", "bsae"), "did you mean 'base'?"),
        (("check", "/nowhere/office.toml"), "/nowhere/office.toml"),
        (("check", "base", "--engine-url", "http://127.0.0.1:9/v1"), "no engine answers at http://127.0.0.1:9/v1"),
        (("model", "pull", "no-such-model"), "What to do:"),
        (("serve", "--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid, port 8080"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_the_reason(newel: Run, args: tuple[str, ...], said: str) -> None:
    code, _, err = newel(*args)
    assert (code, said in err, "Traceback" in err) == (1, True, False), err


# --- tenants and keys


def test_the_secret_of_a_new_key_is_shown_once_and_works(newel: Run, home: Path) -> None:
    code, out, err = newel("keys", "create", "--scope", "admin", "--note", "for ana")
    secret = out.strip()
    assert (code, secret[:3]) == (0, "nk-")
    assert secret not in err
    found = stored(home, lambda store: store.key(secret))
    assert found is not None
    assert (found[0].scope, found[0].note, found[1]) == ("admin", "for ana", Tenant("default", "base"))
    assert secret not in newel("keys", "list")[1] + newel("keys", "list", "--json")[1]


def test_a_revoked_key_works_no_more_and_is_still_listed(newel: Run, home: Path) -> None:
    secret = newel("keys", "create")[1].strip()
    (key,) = json.loads(newel("keys", "list", "--json")[1])
    assert newel("keys", "revoke", key["id"])[0] == 0
    assert stored(home, lambda store: store.key(secret)) is None
    (after,) = json.loads(newel("keys", "list", "--json")[1])
    assert (after["id"], bool(after["revoked_at"])) == (key["id"], True)


def test_a_tenant_keeps_what_is_not_named(newel: Run) -> None:
    assert newel("tenants", "put", "acme", "--policy", "hr")[0] == 0
    assert newel("tenants", "put", "acme", "--when-store-fails", "answer")[0] == 0
    listed = json.loads(newel("tenants", "list", "--json")[1])
    assert listed == [{"name": "acme", "policy": "hr", "when_store_fails": "answer"}]


def test_who_changed_keys_and_tenants_is_audited(newel: Run, home: Path) -> None:
    newel("tenants", "put", "acme", "--policy", "base")
    newel("keys", "create", "--tenant", "acme")
    entries = stored(home, lambda store: store.audit_log())
    assert [(entry.actor, entry.action) for entry in entries] == [("cli:ana", "key.create"), ("cli:ana", "tenant.put")]


# --- policies


def test_a_check_prints_its_report_and_exits_by_it(newel: Run, tmp_path: Path) -> None:
    code, out, _ = newel("check", policy(tmp_path))
    assert (code, "passed: 2 examples" in out) == (0, True)
    code, out, err = newel("check", policy(tmp_path, expect="redact"))
    assert (code, "FAILED" in out, "office.toml:12" in out) == (1, True, True), out
    assert "fails its check" in err


async def test_a_check_asks_the_engine_that_is_named(home: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "graded.toml").write_text(GRADED)

    async def run(*args: str) -> tuple[int | str | None, str]:
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main, ("check", str(tmp_path / "graded.toml"), *args))
        return ended.value.code, capsys.readouterr().out

    async with FakeUpstream(yes=lambda seen: 0.9 if "pill" in json.dumps(seen.body) else 0.1) as upstream:
        code, out = await run("--engine-url", upstream.url)
        assert (code, "2 examples" in out, len(upstream.graded) >= 2) == (0, True, True), out
        asked = len(upstream.graded)
        code, out = await run()
        assert ("not checked, for want of a grader" in out, len(upstream.graded)) == (True, asked)


def test_an_activated_policy_is_live_and_a_failing_one_changes_nothing(newel: Run, home: Path, tmp_path: Path) -> None:
    assert newel("policy", "activate", policy(tmp_path))[0] == 0
    live = stored(home, lambda store: store.active_policy("office"))
    assert live is not None
    assert (live.created_by, "Not yet." in live.source) == ("cli:ana", True)
    assert newel("policy", "activate", policy(tmp_path, reply="Never.", expect="allow"))[0] == 1
    assert stored(home, lambda store: store.policies("office")) == [live]


def test_a_rollback_goes_to_the_version_before(newel: Run, home: Path, tmp_path: Path) -> None:
    for reply in ("One.", "Two.", "Three."):
        newel("policy", "activate", policy(tmp_path, reply=reply))
    by_reply = {}
    for version in stored(home, lambda store: store.policies("office")):
        by_reply[re.search(r'reply = "(\w+)\."', version.source)[1]] = version.version  # type: ignore[index]

    def live() -> str:
        return next(one["version"] for one in json.loads(newel("policy", "list", "--json")[1]) if one["active"])

    assert live() == by_reply["Three"]
    assert newel("policy", "rollback", "office")[0] == 0
    assert live() == by_reply["Two"]
    assert newel("policy", "rollback", "office", by_reply["One"][:8])[0] == 0
    assert live() == by_reply["One"]
    code, _, err = newel("policy", "rollback", "office")
    assert (code, "was ever live" in err, live()) == (1, True, by_reply["One"])


def test_a_draft_is_stored_listed_made_live_by_its_version_and_compared(newel: Run, tmp_path: Path) -> None:
    _, out, _ = newel("policy", "put", policy(tmp_path, reply="One."))
    assert "is stored (draft)" in out
    code, out, err = newel("policy", "put", policy(tmp_path, reply="Two.", expect="redact"))
    assert (code, "is stored (draft)" in out, "before it is activated" in err) == (0, True, True)
    newel("policy", "activate", policy(tmp_path, reply="Three."))
    rows = json.loads(newel("policy", "list", "--json")[1])
    assert [row["state"] for row in rows] == ["active", "draft", "draft"]
    one = next(row["version"] for row in rows if "One." in row["source"])
    two = next(row["version"] for row in rows if "Two." in row["source"])
    code, out, _ = newel("diff", "office", f"office@{one[:6]}")
    assert (code, "    - Three.\n    + One." in out) == (0, True), out
    assert json.loads(newel("diff", f"office@{one}", str(tmp_path / "office.toml"), "--json")[1])["same"] is False
    assert newel("check", f"office@{one[:6]}")[0] == 0
    assert newel("policy", "activate", f"office@{two}")[0] == 1
    assert newel("policy", "activate", f"office@{one[:6]}")[0] == 0
    listed = {row["version"]: row["state"] for row in json.loads(newel("policy", "list", "--json")[1])}
    assert (listed[one], sorted(listed.values())) == ("active", ["active", "draft", "retired"])


def test_who_activates_a_parent_is_told_what_cannot_follow_and_the_list_says_it(newel: Run, tmp_path: Path) -> None:
    newel("policy", "activate", policy(tmp_path))
    change = '[[input]]\nname = "falcon"\nthreshold = 0.4\n'
    (tmp_path / "desk.toml").write_text(f'name = "desk"\nextends = "office"\n{change}')
    assert newel("policy", "activate", str(tmp_path / "desk.toml"))[0] == 0
    code, _, err = newel("policy", "activate", policy(tmp_path, reply="Never."))
    assert (code, "cannot follow" in err) == (0, False)
    desk = next(row for row in json.loads(newel("policy", "list", "desk", "--json")[1]))
    assert desk["problem"] == "" and desk["live_as"] not in ("", desk["version"])
    file = Path(policy(tmp_path))
    file.write_text(file.read_text().replace('"falcon"', '"eagle"'))
    code, _, err = newel("policy", "activate", str(file))
    assert (code, "policy 'desk' cannot follow office@" in err) == (0, True)
    assert "gateways keep what they had" in newel("policy", "list", "desk")[1]


def test_a_check_for_programs_is_json_and_exits_the_same(newel: Run, tmp_path: Path) -> None:
    code, out, _ = newel("check", policy(tmp_path), "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    code, out, _ = newel("check", policy(tmp_path, expect="redact"), "--json")
    assert (code, json.loads(out)["passed"]) == (1, False)


def test_a_check_needs_no_database(newel: Run, home: Path, tmp_path: Path) -> None:
    assert newel("check", policy(tmp_path))[0] == 0
    assert not (home / "newel.db").exists()


def test_the_schema_is_printed_or_written_for_editors(newel: Run, tmp_path: Path) -> None:
    printed = json.loads(newel("policy", "schema")[1])
    code, out, err = newel("policy", "schema", "--output", str(tmp_path / "policy.json"))
    assert (code, out, "#:schema " in err) == (0, "", True)
    assert json.loads((tmp_path / "policy.json").read_text()) == printed


def test_a_policy_whose_parent_the_gateway_cannot_read_is_not_activated(newel: Run, home: Path, tmp_path: Path) -> None:
    policy(tmp_path)
    (tmp_path / "desk.toml").write_text('name = "desk"\nextends = "office"\n')
    code, _, err = newel("policy", "activate", str(tmp_path / "desk.toml"))
    assert (code, stored(home, lambda store: store.policies())) == (1, [])
    assert "office" in err


# --- tickets and webhooks


def test_a_ticket_is_shown_answered_once_and_closed(newel: Run, home: Path) -> None:
    turn = escalated(begun("acme"))
    put(home, turn)
    assert turn.ticket is not None
    id = turn.ticket.id
    (listed,) = json.loads(newel("tickets", "list", "--state", "open", "--json")[1])
    assert (listed["id"], listed["queue"]) == (id, "hr-desk")
    assert turn.asked in newel("tickets", "show", id)[1]
    assert newel("tickets", "answer", id, "--text", "We will call you.")[0] == 0
    shown = json.loads(newel("tickets", "show", id, "--json")[1])
    assert (shown["state"], shown["answer"], shown["answered_by"]) == ("answered", "We will call you.", "ana")
    code, _, err = newel("tickets", "answer", id, "--text", "Again.", "--by", "bo")
    assert (code, "answered by ana" in err) == (1, True)
    assert newel("tickets", "close", id)[0] == 0
    assert json.loads(newel("tickets", "list", "--state", "open", "--json")[1]) == []
    assert json.loads(newel("tickets", "list", "--tenant", "other", "--json")[1]) == []


def test_only_a_dead_delivery_is_sent_again(newel: Run, home: Path) -> None:
    put(home, escalated(begun("acme")))
    (delivery,) = json.loads(newel("webhooks", "list", "--json")[1])
    code, _, err = newel("webhooks", "retry", delivery["id"])
    assert (code, "only a dead one" in err) == (1, True)

    async def kill(store: Store) -> None:
        await store.claim_deliveries(1, 60)
        await store.settle_delivery(delivery["id"], "500")

    stored(home, kill)
    (dead,) = json.loads(newel("webhooks", "list", "--state", "dead", "--json")[1])
    assert newel("webhooks", "retry", dead["id"])[0] == 0
    assert json.loads(newel("webhooks", "list", "--state", "dead", "--json")[1]) == []


# --- turns and the export


def test_a_turn_is_explained_without_what_was_withheld(newel: Run, home: Path) -> None:
    turn = finished(begun("acme"))
    put(home, turn)
    code, out, _ = newel("turn", turn.id)
    assert code == 0
    shown = {"action: refuse", "rule: salary", "policy: hr@1", "total ms: 120.25", f"asked: {turn.asked}"}
    assert shown <= set(out.splitlines())
    assert "hit: input, ids, redact: SSN at 13-24" in out
    assert "hit: input, tone, refuse (shadow): broken: TimeoutError" in out
    assert SECRET not in out + newel("turn", turn.id, "--json")[1]


def test_a_turn_is_shown_with_its_reasoning_and_its_tool_calls(newel: Run, home: Path) -> None:
    made = ToolMessage("assistant", '{"q": "[EMAIL_1]"}', "call_1", "find")
    turn = finished(begun("acme"), reasoning="They want it found.", calls=(made,))
    put(home, turn)
    out = newel("turn", turn.id)[1].splitlines()
    assert {"reasoning: They want it found.", 'call: find {"q": "[EMAIL_1]"} (call_1)'} <= set(out)
    told = json.loads(newel("turn", turn.id, "--json")[1])
    assert told["calls"] == [{"id": "call_1", "name": "find", "arguments": '{"q": "[EMAIL_1]"}'}]


def test_withheld_text_is_shown_for_a_reason_that_is_audited(newel: Run, home: Path) -> None:
    turn = finished(begun("acme"))
    put(home, turn)
    out = newel("turn", turn.id, "--withheld", "--reason", "complaint 7")[1]
    assert RAW in out
    (entry,) = [one for one in stored(home, lambda store: store.audit_log()) if one.action == "withheld.read"]
    assert (entry.actor, entry.subject, entry.detail["reason"]) == ("cli:ana", turn.id, "complaint 7")


def test_an_export_writes_scrubbed_records_and_says_what_it_left_out(newel: Run, home: Path, tmp_path: Path) -> None:
    plain = begun("acme", asked="How long is my notice?", withheld_asked="", input=None, action="allow", rule="")
    told = finished(plain, said="It is long.", withheld_said="", output=None, action="allow", rule="")
    put(home, told)

    async def judge(store: Store) -> None:
        better = "It is three months. Write to jane.miller@example.com."
        await store.add_feedback(opinion(told, kind="correction", value=None, text=better))
        await store.add_feedback(opinion(told, value=0.0))

    stored(home, judge)
    code, out, _ = newel("export", str(tmp_path / "out"), "--tenant", "acme")
    assert code == 0, out
    assert f"{tmp_path}/out/pairs.jsonl: 1" in out
    assert "left out, neutral: 1" in out
    pair = json.loads((tmp_path / "out" / "pairs.jsonl").read_text())
    assert pair["rejected"] == [{"role": "assistant", "content": "It is long."}]
    assert pair["chosen"][0]["content"].startswith("It is three months. Write to [")
    assert newel("export", str(tmp_path / "later"), "--since", "2100-01-01")[0] == 0
    assert (tmp_path / "later" / "pairs.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Write to jane.miller@example.com.", "jane.miller"),
        ("My card is 4111 1111 1111 1111.", "4111"),
        ("Use AKIAIOSFODNN7EXAMPLE there.", "AKIA"),
        ("Call +1 415 555 2671 today.", "2671"),
    ],
)
async def test_an_export_is_scrubbed_of_personal_data_and_secrets(text: str, hidden: str) -> None:
    assert hidden not in await scrubber()(text)


async def test_an_export_leaves_plain_text_as_it_is() -> None:
    text = "Your notice is 3 months; on 12 May 2026 at 10:30 we meet in room 4111."
    assert await scrubber()(text) == text


# --- the model and the gateway


def test_a_model_can_be_pulled_from_a_folder(newel: Run, home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    code, out, _ = newel("model", "pull", "mine", "--from", str(tmp_path / "model"))
    assert code == 0
    assert Path(out.strip()) == home / "models" / "mine"
    assert (home / "models" / "mine" / "model.safetensors").is_file()


def test_a_taken_port_is_refused(newel: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = newel("serve", "--port", str(port))
    assert (code, f"cannot listen on 127.0.0.1, port {port} (address already in use)" in err) == (1, True)
    assert "newel serve --port" in err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NEWEL_WEBHOOK__URL", "http://127.0.0.1:9/hook", "webhook.url is set without webhook.secret"),
        ("NEWEL_HOME", "/dev/null/home", "Not a directory"),
        ("NEWEL_DATABASE", "postgresql://nobody@127.0.0.1:9/newel", "the database cannot be used now"),
    ],
)
async def test_a_gateway_that_cannot_start_says_why_in_one_line(home: Path, name: str, value: str, said: str) -> None:
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=os.environ | {name: value}, stderr=asyncio.subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert "Traceback" not in err.decode()
    assert re.fullmatch(rf"newel: .*{said}.*", err.decode().splitlines()[-1])


async def test_the_gateway_says_where_it_listens_serves_and_stops(home: Path) -> None:
    async with FakeUpstream() as upstream:
        environment = os.environ | {"NEWEL_ENGINE__URL": upstream.url, "NEWEL_ENGINE__MODEL": "fake"}
        command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        found = re.fullmatch(r"newel listens on (http://127\.0\.0\.1:\d+) .*\n", line)
        assert found, line
        async with aiohttp.ClientSession() as http, http.get(f"{found[1]}/livez") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    assert stat.S_IMODE((home / "newel.db").stat().st_mode) == 0o600
