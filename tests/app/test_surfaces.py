"""The other APIs' requests as chat requests, and replies as blocks."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from app.errors import ApiError
from app.records import Key, KeyLimits
from app.schemas import ChatRequest
from app.surfaces import Surface
from app.surfaces.blocks import Block, Blocks, blocks_of
from app.surfaces.completions import Completions
from app.surfaces.messages import Messages
from app.surfaces.responses import Responses
from app.telling import Said
from guardrails.reply import CONTENT, REASONING
from guardrails.types import Message, ToolMessage

Json = dict[str, Any]
KEY = Key("k", "default", "client", "nk-")
CALL_0, CALL_1 = "arguments:0", "arguments:1"


def read(surface: Surface, body: Json, key: Key = KEY, headers: dict[bytes, bytes] | None = None) -> ChatRequest:
    return surface.read(orjson.dumps({"model": "fake"} | body), key, headers or {})


def opening(channel: str, name: str, text: str = "") -> Said:
    return Said(channel, text, int(channel[-1]), f"call_{channel[-1]}", name)


def written(blocks: Blocks, *said: Said, stopped: bool = False) -> list[tuple[str, int, str]]:
    """(what happens, the block's index, the text) of a whole reply."""
    steps = [step for one in said for step in blocks.feed(one)] + list(blocks.finish(stopped))
    return [(what, block.index, text) for what, block, text in steps]


# --- blocks


def test_a_text_is_one_block() -> None:
    steps = written(Blocks(), Said(CONTENT, ""), Said(CONTENT, "a"), Said(CONTENT, "b"))
    assert steps == [("open", 0, ""), ("fill", 0, "a"), ("fill", 0, "b"), ("close", 0, "")]


def test_last_words_go_to_the_block_that_they_belong_to() -> None:
    blocks = Blocks()
    steps = written(blocks, Said(REASONING, "We"), Said(CONTENT, "Yes"), Said(REASONING, "ll."), Said(CONTENT, "."))
    assert [step for step in steps if step[0] == "fill"] == [
        ("fill", 0, "We"),
        ("fill", 1, "Yes"),
        ("fill", 0, "ll."),
        ("fill", 1, "."),
    ]
    assert [(one.channel, one.text) for one in blocks.all] == [(REASONING, "Well."), (CONTENT, "Yes.")]


def test_nothing_comes_between_the_pieces_of_a_call() -> None:
    said = [
        opening(CALL_0, "send", '{"a":'),
        opening(CALL_1, "find", '{"b":'),
        Said(CONTENT, "Hm"),
        Said(CALL_1, "2", 1),
        Said(CALL_0, "1}"),
        Said(CALL_1, "}", 1),
    ]
    blocks = Blocks()
    steps = written(blocks, *said)
    filled = [index for what, index, _ in steps if what == "fill"]
    assert filled == sorted(filled) or filled[:2] == [0, 0]
    assert [(one.name, one.text) for one in blocks.all if one.is_call] == [("send", '{"a":1}'), ("find", '{"b":2}')]
    runs = [index for i, index in enumerate(filled) if i == 0 or filled[i - 1] != index]
    calls = [one.index for one in blocks.all if one.is_call]
    assert all(runs.count(index) == 1 for index in calls), "each call is filled in one go"


def test_a_reply_that_was_stopped_begins_no_more_calls() -> None:
    said = [opening(CALL_0, "send", '{"a":'), opening(CALL_1, "find", "{}"), Said(CONTENT, "No.")]
    cut, whole = Blocks(), Blocks()
    written(cut, *said, stopped=True)
    written(whole, *said)
    assert [one.channel for one in cut.all] == [CALL_0, CONTENT]
    assert [one.channel for one in whole.all] == [CALL_0, CALL_1, CONTENT]
    assert not cut.all[0].is_complete


def test_a_call_is_complete_when_its_arguments_are_json() -> None:
    assert Block(0, CONTENT).is_complete
    assert not Block(0, CALL_0).is_complete and not Block(0, CALL_0, parts=['{"a": ']).is_complete
    assert Block(0, CALL_0, parts=['{"a": ', "1}"]).is_complete


def test_log_probabilities_stay_with_their_block() -> None:
    (block,) = blocks_of([Said(CONTENT, "a", logprobs=(b"1",)), Said(CONTENT, "", logprobs=(b"2",))], False)
    assert (block.text, block.logprobs) == ("a", [b"1", b"2"])


# --- requests


def test_a_prompt_is_what_the_user_says() -> None:
    asked = read(Completions(), {"prompt": ["Hi"], "logprobs": 2, "max_tokens": 5, "echo": False, "best_of": 1})
    assert asked.conversation() == (Message("user", "Hi"),)
    assert asked.sampling() == {"logprobs": True, "top_logprobs": 2, "max_tokens": 5}


@pytest.mark.parametrize("more", [{"prompt": [[1, 2]]}, {"prompt": ["a", "b"]}, {"echo": True}, {"suffix": "x"}])
def test_what_the_older_api_could_do_beside_is_refused_by_name(more: Json) -> None:
    with pytest.raises(ApiError) as caught:
        read(Completions(), {"prompt": "Hi"} | more)
    assert caught.value.param == next(iter(more))


def test_the_items_of_a_reply_are_one_turn_in_any_order() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "find", "arguments": "{}"}
    said = [{"role": "assistant", "content": "Let me "}, call, {"role": "assistant", "content": "see."}]
    result = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "42"}]}
    asked = read(Responses(), {"input": [{"role": "user", "content": "What?"}, {"type": "reasoning"}, *said, result]})
    assert asked.conversation() == (
        Message("user", "What?"),
        Message("assistant", "Let me see."),
        ToolMessage("assistant", "{}", "c1", "find"),
        ToolMessage("tool", "42", "c1", ""),
    )


def test_replies_without_calls_stay_apart() -> None:
    said = [{"role": "assistant", "content": text} for text in ("One.", "Two.")]
    asked = read(Responses(), {"input": [*said, {"role": "user", "content": "And?"}]})
    assert [one.content for one in asked.conversation()] == ["One.", "Two.", "And?"]


def test_the_blocks_of_a_message_are_messages() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "42"}
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "tool_use", "id": "t1", "name": "find", "input": {"q": 1}},
        {"type": "text", "text": "See."},
    ]
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    asked = read(Messages(), {"max_tokens": 9, "messages": talk, "system": [{"type": "text", "text": "Be."}]})
    assert asked.conversation() == (
        Message("system", "Be."),
        Message("user", "A\n\nB"),
        Message("assistant", "See."),
        ToolMessage("assistant", '{"q":1}', "t1", "find"),
        ToolMessage("tool", "42", "t1", ""),
        Message("user", "And?"),
    )


BODIES: list[tuple[Surface, Json]] = [
    (Completions(), {"prompt": "Hi"}),
    (Responses(), {"input": "Hi"}),
    (Messages(), {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}),
]
surfaces = pytest.mark.parametrize(("surface", "body"), BODIES, ids=lambda one: getattr(one, "name", ""))


@surfaces
def test_a_keys_further_fields_go_to_the_engine(surface: Surface, body: Json) -> None:
    allowing = Key("k", "default", "client", "nk-", limits=KeyLimits(allow=("guided_regex",)))
    asked = read(surface, body | {"guided_regex": "a+"}, allowing)
    assert asked.sampling()["guided_regex"] == "a+"
    with pytest.raises(ApiError) as caught:
        read(surface, body | {"guided_regex": "a+"})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "guided_regex")


@surfaces
def test_the_block_mode_is_the_headers_or_the_keys(surface: Surface, body: Json) -> None:
    of_key = Key("k", "default", "client", "nk-", limits=KeyLimits(block_mode="stop"))
    assert read(surface, body).block_mode == "message"
    assert read(surface, body, of_key).block_mode == "stop"
    assert read(surface, body, of_key, {b"x-guardrails-block-mode": b"error"}).block_mode == "error"
    with pytest.raises(ApiError) as caught:
        read(surface, body, KEY, {b"x-guardrails-block-mode": b"loud"})
    assert caught.value.param == "x-guardrails-block-mode"


@surfaces
@pytest.mark.parametrize("sent", [b"", b"[]", b"{", b'{"model": "fake"}', b"\xff"])
def test_what_is_no_request_is_a_mistake_of_the_client(surface: Surface, body: Json, sent: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        surface.read(sent, KEY, {})
    assert caught.value.status == 400
    assert orjson.loads(surface.error(caught.value))["error"]["message"]
