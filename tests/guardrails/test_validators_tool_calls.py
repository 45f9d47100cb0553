import json

import pytest
from pydantic import ValidationError

from guardrails.types import Context, Finding
from guardrails.validators import tool_calls

OPTIONS = tool_calls.Options.model_validate(
    {
        "tools": [
            {
                "name": "transfer",
                "arguments": {
                    "amount": {"type": "number", "min": 1, "max": 500},
                    "to": {"type": "string", "pattern": "[A-Z]{2}[0-9]{4}"},
                    "currency": {"type": "string", "enum": ["EUR", "USD"], "required": False},
                    "tags": {"type": "array", "max": 2, "items": {"type": "string", "max": 5}, "required": False},
                    "urgent": {"type": "boolean", "required": False},
                    "count": {"type": "integer", "enum": [1, 2], "required": False},
                    "by": {"type": "object", "fields": {"id": {"type": "integer"}}, "required": False},
                },
            },
            {"name": "balance"},
        ]
    }
)
ASKED = {"amount": 20, "to": "AB1234"}


NO_CALL = "not a tool call: write a name and arguments, and nothing else"
WRONG_PARTS = "not a tool call: its name is no string, or its arguments are no object"


def call(**arguments) -> str:
    return json.dumps({"name": "transfer", "arguments": {**ASKED, **arguments}})


FINE = [
    "",
    " \n",
    "[]",
    call(),
    call(currency="EUR", urgent=True, count=2, amount=1.5),
    call(tags=["a", "bcdef"]),
    call(by={"id": 7}),
    '{"name": "balance"}',
    '{"name": "balance", "arguments": ""}',
    '{"name": "balance", "arguments": "{}"}',
    json.dumps({"name": "transfer", "arguments": json.dumps(ASKED)}),
    json.dumps([{"name": "balance"}, {"name": "transfer", "arguments": ASKED}]),
    json.dumps({"id": "c1", "type": "function", "function": {"name": "balance", "arguments": "{}"}}),
    json.dumps({"tool_calls": [{"id": "c1", "function": {"name": "transfer", "arguments": json.dumps(ASKED)}}]}),
]  # fmt: skip
WRONG = [
    ('{"name": "delete_all", "arguments": {}}', "tool", "a tool that is not on the list"),
    ('{"name": "Balance"}', "tool", "a tool that is not on the list"),
    ('[{"name": "balance"}, {"name": "rm"}]', "tool", "a tool that is not on the list"),
    (call(amount=501), "argument", "transfer.amount: more than 500"),
    (call(amount=0), "argument", "transfer.amount: less than 1"),
    (call(amount="20"), "argument", "transfer.amount: not of type number"),
    (call(amount=True), "argument", "transfer.amount: not of type number"),
    (call(to="AB1234; drop"), "argument", "transfer.to: does not match its pattern"),
    (call(to="AB1234\n"), "argument", "transfer.to: does not match its pattern"),
    (call(currency="eur"), "argument", "transfer.currency: not one of its values"),
    (call(count=3), "argument", "transfer.count: not one of its values"),
    (call(count=1.0), "argument", "transfer.count: not of type integer"),
    (call(tags=["a", "b", "c"]), "argument", "transfer.tags: more than 2"),
    (call(tags=["abcdef"]), "argument", "transfer.tags[]: more than 5"),
    (call(tags=[1]), "argument", "transfer.tags[]: not of type string"),
    (call(by={"id": 7, "admin": True}), "argument", "transfer.by: an argument that is not on its list"),
    (call(by={}), "argument", "transfer.by.id: missing"),
    (call(secret=1), "argument", "transfer: an argument that is not on its list"),
    (json.dumps({"name": "transfer", "arguments": {"amount": 2}}), "argument", "transfer.to: missing"),
    ('{"name": "balance", "arguments": {"x": 1}}', "argument", "balance: an argument that is not on its list"),
    ("I will call balance now", "unreadable", "not JSON at character 0: expecting value"),
    ('{"name": "balance"', "unreadable", "not JSON at character 18: expecting ',' delimiter"),
    ('{"name": "balance", "name": "transfer"}', "unreadable", "a key stands twice in one object"),
    ('{"name": "balance", "args": {}}', "unreadable", NO_CALL),
    ('{"name": 5}', "unreadable", WRONG_PARTS),
    ('{"name": "balance", "arguments": [1]}', "unreadable", WRONG_PARTS),
    ('{"name": "balance", "arguments": "{oops"}', "unreadable", "not JSON at character 1: expecting property name"),
    ("null", "unreadable", NO_CALL),
    ('{"function": {"function": {"name": "balance"}}}', "unreadable", NO_CALL),
    ("\ud800", "unreadable", "not JSON at character 0: expecting value"),
]  # fmt: skip


async def found(text: str) -> list[Finding]:
    return list(await tool_calls.build(OPTIONS).find(text, Context()))


@pytest.mark.parametrize("text", FINE)
async def test_calls_on_the_list_pass(text):
    assert await found(text) == []


@pytest.mark.parametrize(("text", "label", "note"), WRONG)
async def test_other_calls_are_found_with_the_reason_and_without_the_value(text, label, note):
    (finding,) = await found(text)
    assert (finding.label, finding.end) == (label, len(text))
    assert finding.note.startswith(note)


async def test_a_call_that_cannot_be_read_does_not_hide_the_one_before_it():
    assert [one.label for one in await found('[{"name": "rm"}, {"x": 1}]')] == ["tool", "unreadable"]


async def test_many_wrong_calls_and_deep_ones_cost_little():
    assert len(await found(json.dumps([{"name": "rm"}] * 100_000))) == 100
    assert [one.label for one in await found('{"arguments": ' * 100_000)] == ["unreadable"]


async def test_no_tool_may_be_called_where_the_list_is_empty():
    none = tool_calls.build(tool_calls.Options(tools=[]))
    assert [one.label for one in await none.find('{"name": "a"}', Context())] == ["tool"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"type": "number", "pattern": "x"}, "pattern is for strings"),
        ({"type": "string", "items": {"type": "string"}}, "items is for lists"),
        ({"type": "string", "fields": {}}, "fields for objects"),
        ({"type": "boolean", "max": 3}, "min and max are for numbers"),
        ({"type": "string", "pattern": "("}, "pattern: not a valid regular expression"),
        ({"type": "text"}, "Input should be 'string'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(argument, message):
    with pytest.raises(ValidationError, match=message):
        tool_calls.Argument.model_validate(argument)


def test_a_tool_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="tools: 'a' is named twice"):
        tool_calls.build(tool_calls.Options(tools=[tool_calls.Tool(name="a"), tool_calls.Tool(name="a")]))
