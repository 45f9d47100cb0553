"""Reading policies: what a file means, and that everything wrong with it is said at once, with its line."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from guardrails import catalog
from guardrails.check import check, render
from guardrails.conversation import judge_messages
from guardrails.lines import lines, nearest
from guardrails.policy import Library, PolicyError, Source, load, loads, resolve
from guardrails.schema import ExampleTable, MessageTable, PolicyTable, RouteTable, RuleTable
from guardrails.types import Action, Message

GOOD = """\
name = "desk"
description = "A front desk."
persona = "You are the front desk."

[parts]
animal = ["cat", "dogs?"]

[[input]]
name = "no-pets"
validator = "patterns"
patterns = ['\\b{animal}\\b', 'x{2,3}y']
action = "refuse"
reply = "No pets."
scope = "user"

[[output]]
name = "mail"
validator = "personal"
kinds = ["email"]
action = "redact"

[routes.people]
queue = "people"
due = "15m"

[[example]]
ask = "May I bring my dog?"
expect = "refuse"
rule = "no-pets"
"""


def problems(source: str, folder: Path | None = None) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        loads(source, "desk.toml", [folder] if folder else [])
    return [str(problem) for problem in caught.value.problems]


def test_a_policy_says_what_its_file_says() -> None:
    policy = loads(GOOD, "desk.toml")
    [rule], [out] = policy.input, policy.output
    assert (policy.name, policy.description, policy.persona) == ("desk", "A front desk.", "You are the front desk.")
    assert (rule.name, rule.action, rule.reply, rule.scope) == ("no-pets", Action.REFUSE, "No pets.", "user")
    assert (rule.threshold, rule.if_broken, rule.mode, rule.budget) == (0.5, Action.REFUSE, "enforce", 10.0)
    assert (out.name, out.action, out.scope) == ("mail", Action.REDACT, "all")
    assert policy.routes["people"].due == 900 and policy.routes["people"].priority == "normal"
    [example] = policy.examples
    assert (example.stage, example.expect, example.rule, example.file, example.line) == (
        "input", Action.REFUSE, "no-pets", "desk.toml", 26,
    )  # fmt: skip
    assert policy.source == GOOD
    assert policy.id == f"desk@{policy.version}" and len(policy.version) == 12


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("my dogs", Action.REFUSE),
        ("the CAT", Action.REFUSE),
        ("xxy", Action.REFUSE),
        ("dogma", Action.ALLOW),
        ("xy", Action.ALLOW),
        ("{animal}", Action.ALLOW),
    ],
)
async def test_a_part_stands_for_its_alternatives(text: str, action: Action) -> None:
    verdict, _ = await judge_messages(loads(GOOD).input, (Message("user", text),))
    assert verdict.action is action


@pytest.mark.parametrize(
    "change",
    [
        ('name = "desk"\n', '# A comment.\nname = "desk" # another\n'),
        ('action = "refuse"\nreply = "No pets."\n', 'reply = "No pets."\naction = "refuse"\n'),
        ('due = "15m"', 'due = "900s"'),
        ('scope = "user"', 'scope = "user"\nthreshold = 0.5\nignore_case = true'),
        ("'\\b{animal}\\b'", "'\\b(?:cat|dogs?)\\b'"),
    ],
)
def test_the_version_is_the_same_for_the_same_meaning(change: tuple[str, str]) -> None:
    assert change[0] in GOOD
    assert loads(GOOD.replace(*change)).version == loads(GOOD).version


@pytest.mark.parametrize(
    "change",
    [
        ("No pets.", "No pets!"),
        ("dogs?", "dog"),
        ('due = "15m"', 'due = "16m"'),
        ("front desk", "back desk"),
        ('["cat", "dogs?"]', '["dogs?", "cat"]'),
        ('kinds = ["email"]', 'kinds = ["email", "card"]'),
        ('expect = "refuse"\nrule = "no-pets"', 'expect = "allow"'),
    ],
)
def test_the_version_changes_with_the_meaning(change: tuple[str, str]) -> None:
    assert change[0] in GOOD
    assert loads(GOOD.replace(*change)).version != loads(GOOD).version


def test_the_version_changes_with_the_order_of_rules() -> None:
    first, second = (
        f'[[output]]\nname = "{kind}"\nvalidator = "personal"\nkinds = ["{kind}"]\naction = "redact"\n'
        for kind in ("card", "iban")
    )
    assert loads(GOOD + first + second).version != loads(GOOD + second + first).version


RULE = '[[input]]\nname = "r"\nvalidator = "patterns"\npatterns = ["a"]\n'
REFUSE = f'{RULE}action = "refuse"\nreply = "No."\n'
HEAD = 'name = "desk"\n'


L = "abcdefghijklmnopqr"


def swapped(old: str, new: str) -> str:
    assert old in REFUSE
    return HEAD + REFUSE.replace(old, new)


@pytest.mark.parametrize(
    ("source", "line", "what", "advice"),
    [
        ('name = "desk"\npersona = "oops\n', 2, "not valid TOML", "correct this line"),
        ('persona = "hi"\n', 1, "the policy has no 'name'", "add name = ..."),
        ('name = "My Desk"\n', 1, "name = 'My Desk'", "lower-case letters"),
        ('name = "desk"\npersonna = "hi"\n', 2, "unknown key 'personna'", "did you mean 'persona'?"),
        (f"{HEAD}[input]\nname = 'r'\n", 2, "'input' is a table of its own", "[[input]] with two brackets"),
        (f"{HEAD}{REFUSE}replly = 'x'\n", 8, "rule 'r' has an unknown key 'replly'", "did you mean 'reply'?"),
        (f"{HEAD}{REFUSE}paterns = ['x']\n", 8, "unknown key 'paterns'", "did you mean 'patterns'?"),
        (swapped("refuse", "refuze"), 6, "action = 'refuze'", "did you mean 'refuse'?"),
        (swapped('"patterns"', '"paterns"'), 4, "unknown validator 'paterns'", "'patterns'?"),
        (swapped('["a"]', '["a", "(b"]'), 5, "missing )", "correct this value"),
        (swapped('["a"]', '["x*"]'), 5, "matches the empty text", "correct this value"),
        (swapped('["a"]', '["{pay}"]'), 5, "no part {pay}", "[parts]"),
        (
            swapped("[[input]]", "[parts]\npays = 'x'\n[[input]]").replace('["a"]', '["{pay}"]'),
            7,
            "no part {pay}",
            "did you mean 'pays'",
        ),
        (f"{HEAD}[parts]\nP = 'x'\n", 3, "a part has the name 'P'", "small letters"),
        (f"{HEAD}{REFUSE}threshold = 2\n", 8, "'threshold'", "correct this value"),
        (f"{HEAD}{REFUSE}threshold = '0.5'\n", 8, "'threshold'", "correct this value"),
        (f"{HEAD}{REFUSE}budget = 0\n", 8, "'budget'", "correct this value"),
        (f"{HEAD}{REFUSE}if_broken = 'redact'\n", 8, "if_broken = 'redact'", "there are allow, refuse, escalate"),
        (f"{HEAD}{RULE}action = 'refuse'\n", 6, "has no reply", 'add reply = "..."'),
        (f"{HEAD}{RULE}action = 'append'\nreply = ' '\n", 6, "has no reply", 'add reply = "..."'),
        (f"{HEAD}{RULE}action = 'redact'\nreply = 'x'\n", 7, "'reply', which is not used by action 'redact'", "remove"),
        (f"{HEAD}{REFUSE}placeholder = 'x'\n", 8, "'placeholder', which is not used", "remove"),
        (f"{HEAD}{REFUSE}route = 'x'\n", 8, "'route', which is not used", "remove"),
        (swapped("[[input]]", "[[output]]") + "scope = 'all'\n", 8, "'scope', which is for input", "remove"),
        (swapped("refuse", "escalate"), 2, "no route to escalate to", "[routes.NAME]"),
        (
            swapped("refuse", "escalate") + "route = 'poeple'\n[routes.people]\nqueue = 'q'\ndue = '1h'\n",
            8,
            "unknown route 'poeple'",
            "did you mean 'people'?",
        ),
        (f"{HEAD}{REFUSE}if_broken = 'escalate'\n", 2, "no route to escalate to", "[routes.NAME]"),
        (f"{HEAD}{REFUSE}window = -1\n", 8, "'window'", "correct this value"),
        (f"{HEAD}{REFUSE}wndow = 1\n", 8, "unknown key 'wndow'", "did you mean 'window'?"),
        (f"{HEAD}{REFUSE}scope = 'tools'\n", 8, "scope = 'tools'", "did you mean 'tool'?"),
        (f"{HEAD}{REFUSE}views = 'no'\n", 8, "'views'", "correct this value"),
        (f"{HEAD}{REFUSE}every = 'sentences'\n", 8, "every = 'sentences'", "did you mean 'sentence'?"),
        (f"{HEAD}{REFUSE}every = 'sentence'\n", 8, "'patterns' does not need", "remove it"),
        (f"{HEAD}{REFUSE}sure = 0.5\n", 8, "'sure', which is for rules with `confirm`", "remove it"),
        (f"{HEAD}{REFUSE}vault = true\n", 8, "'vault', which is not used by action 'refuse'", "remove it"),
        (f"{HEAD}{REFUSE}locked = 'yes'\n", 8, "'locked'", "correct this value"),
        (f"{HEAD}{REFUSE}confirm = 'grader'\n", 8, "'confirm'", "correct this value"),
        (f"{HEAD}{REFUSE}confirm = {{ max_words = 3 }}\n", 8, "confirm has no 'validator'", 'add validator = "..."'),
        (f"{HEAD}{REFUSE}confirm = {{ validator = 'lenght' }}\n", 8, "unknown validator 'lenght'", "mean 'length'?"),
        (
            f"{HEAD}{REFUSE}confirm = {{ validator = 'patterns', patterns = ['a'], lable = 'x' }}\n",
            8,
            "confirm has an unknown key 'lable'",
            "did you mean 'label'?",
        ),
        (
            f"{HEAD}{REFUSE}confirm = {{ validator = 'patterns', patterns = ['{{pay}}'] }}\n",
            8,
            "no part {pay}",
            "[parts]",
        ),
        (swapped("[[input]]", "[[output]]") + "window = 2\n", 8, "'window', which is for input", "remove"),
        (
            f"{HEAD}[[output]]\nname = 'r'\nvalidator = 'personal'\naction = 'redact'\nvault = true\n",
            6,
            "'vault', which is for input rules",
            "remove it",
        ),
        (f"{HEAD}extends = '../base'\n", 2, "extends = '../base'", "lower-case letters"),
        (f"{HEAD}remove = ['r']\n{REFUSE}", 2, "removes rule 'r', which no policy that it extends has", "remove this"),
        (f"{HEAD}a = {'[' * 5000}\n", 1, "brackets are nested too deep", "less nested"),
        (f"{HEAD}{REFUSE}window = {'9' * 5000}\n", 9, "not valid TOML: Exceeds the limit", "correct this line"),
        ('name = "desk"\npersona = "\ud800"\n', 2, "half of a surrogate pair", "UTF-8"),
        (f"{HEAD}# {'x' * 1_000_000}\n", 1, "more than 1,000,000 characters", "divide it"),
        (f"{HEAD}[[example]]\nask = 'aaaaaaaaaaa'\ntimes = 100000\nexpect = 'allow'\n", 4, "1,000,000", "fewer times"),
        (
            HEAD + "[parts]\naa = 'x'\n" + "".join(f"{b}{b} = '{{{a}{a}}}{{{a}{a}}}'\n" for a, b in pairwise(L)),
            17,
            "more than 100,000 characters",
            "several patterns",
        ),
        (
            f"{HEAD}[[example]]\nask='a'\nexpect='allow'\nturns=[{{role='usr', content='x'}}]\n",
            5,
            "turns.0.role = 'usr'",
            "did you mean 'user'?",
        ),
        (f"{HEAD}[[example]]\nask='a'\nexpect='allow'\ndocument=['x']\n", 5, "'document'", "mean 'documents'?"),
        (f"{HEAD}{REFUSE}{REFUSE}", 9, "name of another rule (desk.toml:2)", "a name of its own"),
        (
            f"{HEAD}[[input]]\nname = 'r'\nvalidator = 'length'\nmax_words = 9\naction = 'redact'\n",
            6,
            "'length' judges a text as a whole",
            "refuse instead",
        ),
        (f"{HEAD}[[input]]\nname='r'\nvalidator='length'\naction='refuse'\nreply='x'\n", 2, "set max_chars", "correct"),
        (f"{HEAD}[routes.r]\nqueue = 'q'\ndue = 'soon'\n", 4, "a number and a unit", "correct"),
        (f"{HEAD}[routes.r]\nqueue = 'q'\ndue = '1h'\npriority = 'urgnt'\n", 5, "priority = 'urgnt'", "'urgent'?"),
        (f"{HEAD}[[example]]\nexpect = 'allow'\n", 2, "what is asked or what is answered", "`ask` or `answer`"),
        (f"{HEAD}[[example]]\nask='a'\nanswer='b'\nexpect='allow'\n", 2, "asked or what is answered", "`ask` or"),
        (
            f"{HEAD}{REFUSE}[[example]]\nask = 'a'\nexpect = 'refuse'\nrule = 'rr'\n",
            11,
            "not an input rule",
            "mean 'r'?",
        ),
        (
            f"{HEAD}{REFUSE}[[example]]\nanswer='a'\nexpect='refuse'\nrule='r'\n",
            11,
            "not an output rule",
            "there is none",
        ),
        (
            f"{HEAD}{REFUSE}[[example]]\nask='b'\nexpect='allow'\nrule='r'\n",
            11,
            "allowed names a rule",
            "remove `rule`",
        ),
        (f"{HEAD}[[example]]\nask='a'\nexpect='refuse'\nbecomes='b'\n", 5, "does not change this text", "remove"),
        (f"{HEAD}extends = 'bass'\n", 2, "no policy 'bass' to extend", "did you mean 'base'?"),
        (
            f"{HEAD}[[input]]\nname='t'\nvalidator='topics'\naction='allow'\n[[input.topics]]\nname='x'\nwords=['a']\n"
            "unles=['b']\n",
            9,
            "unknown key 'topics.0.unles'",
            "docs/validators.md",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_what_to_do(source: str, line: int, what: str, advice: str) -> None:
    found = problems(source)
    assert len(found) == 1, found
    where, _, rest = found[0].partition(": ")
    said, _, done = rest.rpartition("; ")
    assert where == f"desk.toml:{line}"
    assert what in said and advice in done


def test_all_problems_are_found_in_one_go() -> None:
    source = """\
name = "Desk"
extends = "nowhere"
colour = "red"
[[input]]
name = "one"
validator = "patterns"
patterns = ["(a", "b", "[c"]
action = "refuse"
[[output]]
name = "one"
validator = "personal"
kinds = ["emale"]
action = "redakt"
[[example]]
ask = "a"
expect = "nothing"
"""
    assert [problem.split(": ")[0] for problem in problems(source)] == [
        f"desk.toml:{line}" for line in (1, 2, 3, 7, 7, 10, 12, 13, 16)
    ]


def test_every_bad_pattern_of_a_list_is_found() -> None:
    source = HEAD + REFUSE.replace('["a"]', '[\n"(a",\n"b",\n"[c"]')
    assert [problem.split(": ")[0] for problem in problems(source)] == ["desk.toml:6", "desk.toml:8"]


PARENT = GOOD.replace("desk", "house").replace('route = "x"', "")
CHILD = """\
name = "room"
extends = "house"
persona = "You are a room."
[[input]]
name = "no-smoke"
validator = "patterns"
patterns = ["smoke"]
action = "escalate"
route = "people"
reply = "No smoke."
"""


def test_a_child_has_its_parents_rules_first_and_its_own_persona(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(PARENT)
    (tmp_path / "room.toml").write_text(CHILD)
    policy = load(tmp_path / "room.toml")
    assert [rule.name for rule in policy.input] == ["no-pets", "no-smoke"]
    assert (policy.name, policy.persona, policy.source) == ("room", "You are a room.", CHILD)
    assert [Path(example.file).name for example in policy.examples] == ["house.toml"]
    assert (
        load("room", [tmp_path]) == load(tmp_path / "room.toml") or policy.version == load("room", [tmp_path]).version
    )
    (tmp_path / "house.toml").write_text(PARENT.replace("No pets.", "No!"))
    assert load(tmp_path / "room.toml").version != policy.version


def test_a_child_without_a_persona_has_its_parents(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(PARENT)
    child = loads(CHILD.replace('persona = "You are a room."\n', ""), folders=[tmp_path])
    assert child.persona == "You are the front house."


def test_a_child_may_move_a_route_and_restate_an_example(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(PARENT)
    restated = '[[example]]\nask = "May I bring my dog?"\nexpect = "escalate"\n'
    child = loads(f'{CHILD}[routes.people]\nqueue = "night"\ndue = "2h"\n{restated}', folders=[tmp_path])
    assert (child.routes["people"].queue, child.routes["people"].due) == ("night", 7200)
    assert [example.expect for example in child.examples] == [Action.ESCALATE]


def test_the_problems_of_a_parent_are_said_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(PARENT.replace('due = "15m"', 'due = "15"'))
    [problem] = problems(CHILD, tmp_path)
    assert "house.toml:24: " in problem


def test_a_circle_of_parents_is_an_error(tmp_path: Path) -> None:
    for name, parent in (("one", "two"), ("two", "three"), ("three", "one")):
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nextends = "{parent}"\n')
    with pytest.raises(PolicyError, match=r"three\.toml:2: the policy extends 'one' in a circle; remove one"):
        load(tmp_path / "one.toml")


def test_a_policy_may_extend_the_shipped_one_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\nextends = "base"\npersona = "Mine."\n')
    policy = load("base", [tmp_path])
    assert policy.persona == "Mine."
    assert [rule.name for rule in policy.input] == [rule.name for rule in load("base").input]


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "front.toml").write_text(GOOD)
    with pytest.raises(PolicyError, match=r"there is no policy of this name; there are base, .*\bfront, .*\bhr\b"):
        load("xyz", [tmp_path])
    with pytest.raises(PolicyError, match=r"cannot be read \(No such file or directory\); did you mean 'front'\?"):
        load(tmp_path / "frnt.toml")
    with pytest.raises(PolicyError, match="there is none"):
        load(tmp_path / "nowhere" / "x.toml")


def test_a_file_that_is_not_utf_8_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b'name = "x"\npersona = "caf\xe9"\n')
    with pytest.raises(PolicyError, match=r"x\.toml:2: the file is not UTF-8; save it as UTF-8"):
        load(tmp_path / "x.toml")


def test_every_key_list_item_and_table_has_its_line() -> None:
    places = lines(
        'a = """\n[[x]]\nb = 1"""\n[[rule]] # c\nlist = [\n  "]", # d\n  \'\'\'\n\'\'\', {k = 1, l = [2]},\n]\n'
        '"quoted.key" = 1979-05-27 07:32:00\n[[rule]]\n[rule.sub]\nx.y = 1.5\n'
    )
    assert places == {
        ("a",): 1,
        ("rule",): 4,
        ("rule", 0): 4,
        ("rule", 0, "list"): 5,
        ("rule", 0, "list", 0): 6,
        ("rule", 0, "list", 1): 7,
        ("rule", 0, "list", 2): 8,
        ("rule", 0, "list", 2, "k"): 8,
        ("rule", 0, "list", 2, "l"): 8,
        ("rule", 0, "list", 2, "l", 0): 8,
        ("rule", 0, "quoted.key"): 10,
        ("rule", 1): 11,
        ("rule", 1, "sub"): 12,
        ("rule", 1, "sub", "x"): 13,
        ("rule", 1, "sub", "x", "y"): 13,
    }
    assert nearest(places, ("rule", 1, "nothing", 3)) == 11
    assert nearest(places, ("nothing",)) == 1


def test_a_policy_is_looked_for_in_the_store_then_in_the_folders_then_among_the_shipped(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text('name = "house"\npersona = "Of the folder."\n')
    child = Source("room", 'name = "room"\nextends = "house"\n')
    stored = {"house": Source("house@1", 'name = "house"\nextends = "base"\npersona = "Of the store."\n')}
    found = resolve(child, Library((tmp_path,), stored))
    assert (found.policy.persona, found.parents) == ("Of the store.", ("house", "base"))
    assert found.files[:2] == ("room", "house@1") and found.files[2].endswith("policies/base.toml")
    assert resolve(child, Library((tmp_path,))).policy.persona == "Of the folder."
    assert resolve("house", Library((tmp_path,), stored)).files[0] == "house@1"


def test_a_policy_does_not_extend_another_version_or_a_copy_of_itself(tmp_path: Path) -> None:
    """An activated file is in the store, too: neither reading may take the other one for a parent."""
    text = 'name = "base"\nextends = "base"\nremove = ["injection"]\n'
    (tmp_path / "base.toml").write_text(text)
    older = {"base": Source("base@1", 'name = "base"\nextends = "base"\nremove = ["injection", "too-long"]\n')}
    for policy in (tmp_path / "base.toml", Source("base@2", text)):
        found = resolve(policy, Library((tmp_path,), older))
        assert len(found.files) == 2 and "injection" not in [rule.name for rule in found.policy.input]
        assert "too-long" in [rule.name for rule in found.policy.input]


def test_the_version_covers_what_is_extended() -> None:
    child = Source("room", 'name = "room"\nextends = "house"\n')
    one, same, other = (
        resolve(child, Library((), {"house": Source("house", text)})).policy.version
        for text in (PARENT, f"# A comment.\n{PARENT}", PARENT.replace("No pets.", "No!"))
    )
    assert one == same != other


def test_rules_have_one_key_when_they_ask_the_same() -> None:
    rule = '[[input]]\nname = "{}"\nvalidator = "personal"\n{}action = "redact"\n'
    rules = {
        "plain": "",
        "spelled-out": f"kinds = {list(catalog.options('personal').model_fields['kinds'].get_default())!r}\n",
        "fewer": 'kinds = ["card"]\n',
        "shown-otherwise": 'placeholder = "x"\nthreshold = 0.9\nscope = "tool"\n',
        "confirmed": 'confirm = { validator = "length", max_words = 3 }\n',
        "confirmed-otherwise": 'confirm = { validator = "length", max_words = 4 }\n',
    }
    policy = loads(HEAD + "".join(rule.format(name, more) for name, more in rules.items()))
    keys = {rule.name: rule.key for rule in policy.input}
    assert keys["plain"] == keys["spelled-out"] == keys["shown-otherwise"]
    assert len(set(keys.values())) == 4 and "" not in keys.values()


def test_a_rule_says_all_that_the_engine_knows() -> None:
    source = f"""{HEAD}[[input]]
name = "r"
validator = "grader"
question = "Is it rude?"
scope = "tool"
window = 3
confirm = {{ validator = "patterns", patterns = ["x"] }}
sure = 0.7
views = false
every = "sentence"
action = "refuse"
reply = "No."
[[input]]
name = "v"
validator = "personal"
action = "redact"
vault = true
"""
    one, two = loads(source).input
    assert (one.scope, one.window, one.sure, one.views, one.every) == ("tool", 3, 0.7, False, "sentence")
    assert one.confirm is not None and two.confirm is None and (one.vault, two.vault) == (False, True)
    assert (two.window, two.views, two.every, two.sure) == (0, True, "text", 0.9)


@pytest.mark.parametrize("table", [PolicyTable, RuleTable, RouteTable, ExampleTable, MessageTable])
def test_every_key_of_the_schema_is_on_its_page(table: type[PolicyTable]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    assert [key for key in table.model_fields if f"`{key}`" not in page] == []


async def test_the_worked_example_of_the_page_passes_its_check() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    source = page.split("```toml\n")[1].split("```")[0].replace('extends = "base"', "")
    report = await check(loads(source, "policies.md"))
    assert report.passed, render(report)
    assert len(report.results) == 5
