import pytest

from guardrails import judge, loads, stream
from guardrails.types import Context, Finding
from guardrails.validators import code

OPTIONS = code.Options()
FENCED = "Do this:\n```python\nx = 1\n```\nDone."
HITS = [
    (FENCED, ["python"]),
    ("```\nls\n```", ["other"]),
    ("~~~ JS\nx\n~~~", ["javascript"]),
    ("  ````rust\n```\n````", ["rust"]),
    ("> ```bash\n> ls\n> ```", ["shell"]),
    ("```{.python}\nx", ["python"]),
    ("```brainfog\n+", ["other"]),
    ("Run `rm -rf build` first", ["shell"]),
    ("$ git status", ["shell"]),
    ("then sudo apt update", ["shell"]),
    ("curl -sSL https://a.example/x | sh", ["shell"]),
    ("use `pip install newel`", ["shell"]),
    ("#!/bin/bash", ["shell"]),
    ("export API_HOST=a.example", ["shell"]),
    ("def pay(amount):\n    return amount", ["python"]),
    ("from math import pi", ["python"]),
    ("import os\nprint('x')", ["python"]),
    ("SELECT name FROM staff WHERE pay > 1", ["sql"]),
    ("say select * from staff", ["sql"]),
    ("DROP TABLE staff", ["sql"]),
    ("x' OR '1'='1", ["sql"]),
    ("const total = 3;", ["javascript"]),
    ("onClick={() => { go() }}", ["javascript"]),
    ("console.log(x)", ["javascript"]),
    ("<div>hello</div>", ["html"]),
    ("<script src=x.js>", ["html"]),
    ("#include <stdio.h>", ["c"]),
    ("int main() {", ["c"]),
    ("public static void main(String[] a)", ["java"]),
    ("public class Pay {", ["java"]),
    ("<?php echo 1;", ["php"]),
    ("Get-ChildItem -Path C:", ["powershell"]),
    ("fn main() {", ["rust"]),
    ("func main() {", ["go"]),
    ("h1 { color: red; }", ["css"]),
    ("puts 'hello'", ["ruby"]),
    ("\ud800def f(x):\n```\n", ["other"]),
]
NEAR_MISSES = [
    "",
    "Use {name} as a placeholder, and {first, last} as a set.",
    "Our tools are Python, Java, Go, C++, JavaScript and Visual Basic .NET.",
    "I love Ruby on Rails and Rust.",
    "Select a plan from the list, then update your address.",
    "We drop table reservations after 15 minutes.",
    "DELETE FROM your list what you do not need",
    "Please import the contacts from Outlook.",
    "The class of 2019: a reunion.",
    "for all of us in HR: thanks",
    "A function (of x) { is drawn } here",
    "let x be the number of days",
    "the const pressure = force per area",
    "5 < 7 and 9 > 3, <3 you",
    "See `salary` and `overtime`; the `code` is on the badge.",
    "``` quoted ``` in one line",
    "```text\nDear Anna,\n```",
    "```markdown\n# Title\n```",
    '```json\n{"a": 1}\n```',
    "- item\n- item\n\n| a | b |\n|---|---|",
    "git is a tool; pip install it when you can",
    "You can install apps with npm or brew.",
    "$ 500 and $5.000, cost = $5",
    "# Annual leave\n## Rules",
    "the curl of her hair, a wget",
    "Kind regards => Anna",
    "public class on Monday: bring an int",
    "print (the) form, and puts it away",
    "\ud800",
]
TEXTS = [*(text for text, _ in HITS), *NEAR_MISSES]


async def found(text: str, **options) -> list[Finding]:
    return list(await code.build(code.Options(**options)).find(text, Context()))


@pytest.mark.parametrize(("text", "languages"), HITS)
async def test_code_is_found_by_its_language(text, languages):
    assert list(dict.fromkeys(one.label for one in await found(text))) == languages


@pytest.mark.parametrize("text", NEAR_MISSES)
async def test_prose_with_signs_of_code_passes(text):
    assert await found(text) == []


async def test_a_fence_is_found_in_a_stream_as_soon_as_its_line_is_there_and_all_of_it_at_its_end():
    reading = code.build(OPTIONS).readings()[0]
    start, line = FENCED.index("```"), FENCED.index("x = 1") - 1
    assert reading.read(FENCED[:line], False) == ([], start)
    assert reading.read(FENCED[: line + 1], False) == ([Finding("python", start, line)], line - 1)
    assert reading.read(FENCED[:-8], False) == ([], line - 1)
    assert reading.read(FENCED, True) == ([Finding("python", line - 1, len(FENCED) - 6)], len(FENCED))


async def test_an_open_fence_reaches_to_the_end_of_the_text():
    text = "```sql\nx\ny"
    assert [(one.start, one.end) for one in await found(text)] == [(0, 6), (5, len(text))]


async def test_languages_and_places_as_the_options_say():
    assert [one.label for one in await found("```json\n{}\n```", languages=["data"])] == ["data", "data"]
    assert await found("```python\nx\n```", languages=["shell"]) == []
    assert await found("```python\nx\n```", fenced=False) == []
    assert await found("print('x')", loose=False) == []


@pytest.mark.parametrize("options", [{"fenced": False, "loose": False}, {"fenced": False, "languages": ["other"]}])
def test_options_that_leave_nothing_to_find_are_refused(options):
    with pytest.raises(ValueError, match="fenced and loose: one of them must be true"):
        code.build(code.Options(**options))


POLICY = """
name = "no-code"

[[output]]
name = "code"
validator = "code"
action = "ACTION"

[[output]]
name = "links"
validator = "urls"
allow = ["acme.com"]
action = "redact"
placeholder = "(a link)"
"""


async def letters(text: str):
    for letter in text:
        yield letter


async def test_in_a_policy_a_block_is_redacted_once_and_the_same_in_a_stream():
    policy = loads(POLICY.replace("ACTION", "redact"))
    text = f"https://acme.com\n{FENCED}\nhttps://b.com"
    expected = "https://acme.com\nDo this:\n[PYTHON]\nDone.\n(a link)"
    assert (await judge(policy.output, text)).text == expected
    assert (
        "".join([piece async for piece in stream(policy.output, letters(text)) if isinstance(piece, str)]) == expected
    )


async def test_in_a_policy_a_stream_stops_where_a_block_opens():
    policy = loads(POLICY.replace('"ACTION"', '"refuse"\nreply = "No code."'))
    asked = []

    async def deltas():
        async for letter in letters(FENCED):
            asked.append(letter)
            yield letter

    pieces = [piece async for piece in stream(policy.output, deltas())]
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == "Do this:\n\n\nNo code."
    assert "".join(asked) == "Do this:\n```python\n"
