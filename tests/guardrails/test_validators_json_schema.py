import json

import pytest
from pydantic import ValidationError

from guardrails.types import Context, Finding, StreamValidator
from guardrails.validators import json_schema

SHAPE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20, "pattern": "^[A-Z]"},
        "days": {"type": "integer", "minimum": 0, "maximum": 30},
        "tags": {"type": "array", "items": {"enum": ["pay", "leave"]}, "uniqueItems": True},
        "a/b~c": {"type": "null"},
        "more": {"additionalProperties": {"type": "number"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}
FITS = [
    '{"name": "Anna"}',
    ' {"name": "Anna", "days": 3}\n',
    '{"name": "Anna", "days": 3.0}',
    '{"name": "Ann\\"a", "tags": ["pay", "leave"]}',
    '{"name": "A{[", "tags": []}',
    '```json\n{"name": "Anna"}\n```',
    '\n```\n{"name": "Anna"}\n```\n',
    '{"name": "Anna", "a/b~c": null}',
    '{"name": "Anna", "more": {"x": 1e5}}',
    '{"name": "Anne \\ud83d\\ude00"}',
    '{"name": "A\\ud800"}',
    '{"name": "A", "days": 0}',
]
WRONG = [
    ("", "json", "not JSON at character 0"),
    ("Here it is: {}", "json", "not JSON at character 0"),
    ('{"name": "Anna"} Bye', "json", "not JSON at character 17"),
    ('{"name": "Anna",}', "json", "not JSON at character"),
    ("{'name': 'Anna'}", "json", "not JSON at character 1"),
    ('{"name": "Anna"', "json", "not JSON at character"),
    ('{"name": "A", "name": "B"}', "json", "a key stands twice"),
    ('{"name": "A", "days": NaN}', "json", "NaN and Infinity"),
    ('{"name": "A", "days": 1e999}', "json", "too large"),
    ('{"name": "A", "days": ' + "9" * 5000 + "}", "json", "more than 100 digits"),
    ("[" * 100_000, "json", "deeper than 64 brackets at character 64"),
    ('{"a":' * 30_000, "json", "deeper than 64 brackets"),
    ('"' + '\\"' * 50_000, "json", "not JSON"),
    ('"\\' * 50_000, "json", "not JSON"),
    ("\ud800", "json", "not JSON"),
    ('see\n```json\n{"name": "Anna"}\n```', "json", "not JSON"),
    ("[]", "schema", "/: type"),
    ("{}", "schema", "/: required"),
    ('{"name": "anna"}', "schema", "/name: pattern"),
    ('{"name": 5}', "schema", "/name: type"),
    ('{"name": "A", "days": 31}', "schema", "/days: maximum"),
    ('{"name": "A", "days": true}', "schema", "/days: type"),
    ('{"name": "A", "days": "3"}', "schema", "/days: type"),
    ('{"name": "A", "tags": ["pay", "secret"]}', "schema", "/tags/1: enum"),
    ('{"name": "A", "tags": ["pay", "pay"]}', "schema", "/tags: uniqueItems"),
    ('{"name": "A", "a/b~c": 1}', "schema", "/a~1b~0c: type"),
    ('{"name": "A", "secret key": 1}', "schema", "/: additionalProperties"),
    ('{"name": "A", "more": {"secret key": "x"}}', "schema", "/more/*: type"),
]  # fmt: skip


async def found(text: str, **options) -> list[Finding]:
    return list(await json_schema.build(json_schema.Options(**{"shape": SHAPE, **options})).find(text, Context()))


@pytest.mark.parametrize("text", FITS)
async def test_a_reply_that_fits_passes(text):
    assert await found(text) == []


@pytest.mark.parametrize(("text", "label", "note"), WRONG)
async def test_a_reply_that_does_not_fit_is_found_with_the_place_and_never_the_value(text, label, note):
    (finding,) = await found(text)
    assert (finding.label, finding.start, finding.end) == (label, 0, len(text))
    assert finding.note.startswith(note) or note in finding.note
    assert "secret" not in finding.note


async def test_a_reply_that_is_wrong_everywhere_says_so_twenty_times():
    text = json.dumps({"name": "A", "tags": ["x"] * 30_000})
    assert len(await found(text)) == 20


async def test_what_may_stand_around_it_and_how_long_it_may_be_are_options():
    assert [one.label for one in await found(FITS[5], fenced=False)] == ["json"]
    assert [one.note for one in await found(FITS[0], max_chars=5)] == ["more than 5 characters"]


async def test_many_items_are_compared_in_little_time():
    shape = {"type": "array", "uniqueItems": True}
    items = [{"n": number} for number in range(15_000)]
    assert await found(json.dumps(items), shape=shape) == []
    assert [one.note for one in await found(json.dumps([*items, {"n": 7.0}]), shape=shape)] == ["/: uniqueItems"]


def test_a_stream_waits_for_the_whole_reply():
    assert not isinstance(json_schema.build(json_schema.Options(shape=SHAPE)), StreamValidator)


async def test_the_schema_may_stand_in_a_file(tmp_path):
    (tmp_path / "pay.json").write_text('{"type": "integer"}')
    options = json_schema.Options.model_validate({"file": "pay.json"}, context={"folder": tmp_path})
    assert options.shape == {"type": "integer"}
    assert await json_schema.build(options).find("5", Context()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "write a shape, or a file that has one"),
        ({"shape": {"type": "null"}, "file": "list.json"}, "write shape or file, not both"),
        ({"file": "list.json"}, "'list.json' holds no JSON object"),
        ({"file": "bad.json"}, "Expecting value"),
    ],
)
def test_a_schema_that_cannot_be_had_is_refused(tmp_path, given, message):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("nope")
    with pytest.raises(ValidationError, match=message):
        json_schema.Options.model_validate(given, context={"folder": tmp_path})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"type": "objekt"}, "shape: /type: 'objekt' is not valid"),
        ({"properties": {"a": {"minimum": "3"}}}, "shape: /properties/a/minimum: '3' is not of type 'number'"),
        ({"properties": {"a": {"$ref": "https://a.example/x"}}}, "it refers to 'https://a.example/x'; put that under"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "it refers to '#/\\$defs/none'"),
        ({"$ref": "#"}, "it cannot be used: RecursionError"),
        ({"properties": {"a": {"pattern": "("}}}, "shape: /properties/a/pattern: .* is not a 'regex'"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_when_it_is_built(shape, message):
    with pytest.raises(ValueError, match=message):
        json_schema.build(json_schema.Options(shape=shape))
