"""The embedded CPU engine, asked by the real openai SDK over loopback, and its parts with hand-made tokens."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")

import openai  # noqa: E402

from alignment.batch import Batch, Busy, Piece, Sequence, Text  # noqa: E402
from alignment.decoder import Decoder, Sampler, Sampling, Segment, Slot  # noqa: E402
from alignment.serve import ChatRequest  # noqa: E402

ROOT = Path(__file__).parents[2]
KEY = "secret"
NAME = "smol"
QUESTIONS = [
    "Write a story about a lighthouse.",
    "Explain how rain forms.",
    "Describe the history of bread.",
    "Give a tour of Paris.",
    "Explain photosynthesis step by step.",
    "Write a letter to a friend about winter.",
    "Describe how a bicycle works, and name each part of it, please, for a child of seven years who likes wheels.",
    "Tell a tale about a fox and a crow.",
]


class Letters:
    """A tokenizer whose tokens are single bytes."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")


def said(text: str, stop: tuple[str, ...] = (), flush: bool = True) -> list[str]:
    """Returns the pieces that leave when the bytes of a text come one by one."""
    out, writer = [], Text(Letters(), stop)
    for byte in text.encode():
        out.append(writer.push(byte))
        if writer.stopped:
            break
    return [piece for piece in [*out, writer.flush() if flush else ""] if piece]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "🎉👩‍👩‍👧 mixed é", "\ufffd inside"])
def test_text_leaves_in_whole_characters(text: str) -> None:
    pieces = said(text)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces).replace("\ufffd inside", "")


def test_half_a_character_at_the_end_is_dropped() -> None:
    writer = Text(Letters())
    assert [writer.push(b) for b in "aé".encode()[:-1]] == ["a", ""]
    assert writer.flush() == ""


@pytest.mark.parametrize(
    ("text", "stop", "left", "stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one tw", ("two",), "one tw", False),
        ("aab", ("ab",), "a", True),
        ("ababac", ("abac",), "ab", True),
        ("x END y", ("END", " EN"), "x", True),
        ("stop", ("stop",), "", True),
        ("nothing", ("",), "nothing", False),
        ("é stop é", ("é", "stop"), "", True),
    ],
)
def test_no_part_of_a_stop_string_leaves(text: str, stop: tuple[str, ...], left: str, stopped: bool) -> None:
    writer, out = Text(Letters(), stop), ""
    for byte in text.encode():
        out += writer.push(byte)
        if writer.stopped:
            break
        assert left.startswith(out)
    assert (out + writer.flush(), writer.stopped) == (left, stopped)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    for top_p, kept in [(0.01, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=1))
        assert {sampler.draw(logits).token for _ in range(300)} == kept, top_p


def test_penalties_follow_openais_formula() -> None:
    sampler = Sampler(Sampling(temperature=0, presence=1.0, frequency=0.5))
    logits = torch.tensor([3.0, 2.0, 0.0])
    # 3.0 wins, then 3 - 1 - 0.5 = 1.5 loses to 2.0, which becomes 0.5, so 1.5 wins again, then it is 3 - 1 - 1 = 1.0
    assert [sampler.draw(logits).token for _ in range(4)] == [0, 1, 0, 0]


def test_a_request_that_does_not_say_is_sampled_as_the_model_is_usually() -> None:
    ask = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    plain = ChatRequest.model_validate(ask).sampling((0.2, 0.9))
    assert (plain.temperature, plain.top_p) == (0.2, 0.9)
    said = ChatRequest.model_validate(ask | {"temperature": 0, "top_p": 0.5}).sampling((0.2, 0.9))
    assert (said.temperature, said.top_p) == (0, 0.5)


def test_the_checkpoint_says_how_its_makers_sample_from_it(model_dir: Path) -> None:
    config = json.loads((model_dir / "generation_config.json").read_text())
    assert (config["do_sample"], config["temperature"], config["top_p"]) == (True, 0.2, 0.9)


def test_logprobs_are_those_before_temperature() -> None:
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1]))
    scored = Sampler(Sampling(temperature=0, top=2)).draw(logits)
    assert scored.token == 0 and math.isclose(scored.logprob, math.log(0.7), rel_tol=1e-5)
    assert [(t, round(math.exp(p), 4)) for t, p in scored.top] == [(0, 0.7), (1, 0.2)]


class Stuck:
    """A decoder that takes no step until it may."""

    def __init__(self) -> None:
        self.slots, self.eos, self.context = [Slot()], frozenset({0}), 100
        self.go = threading.Event()
        self.fail = False

    def claim(self, prompt: list[int], salt: str) -> tuple[int, int]:
        return 0, 0

    def release(self, slot: int, forget: bool = False) -> None:
        pass

    def step(self, segments: list[Segment]) -> Any:
        assert self.go.wait(10)
        if self.fail:
            raise RuntimeError("no memory")
        logits = torch.zeros(len(segments), 128)
        logits[:, 65] = 1.0
        return logits


def sequence(pieces: list[Piece], limit: int = 3) -> Sequence:
    return Sequence([1, 2], limit, Sampling(temperature=0), Text(Letters()), pieces.append)


def running(decoder: Stuck, queue: int) -> tuple[Batch, threading.Thread]:
    batch = Batch(decoder, queue=queue)  # type: ignore[arg-type]
    thread = threading.Thread(target=batch.run)
    thread.start()
    return batch, thread


def wait_for(what: Any, seconds: float = 20.0) -> float:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not come"
        time.sleep(0.01)
    return time.monotonic() - began


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    decoder, pieces = Stuck(), []  # type: ignore[var-annotated]
    batch, thread = running(decoder, queue=1)
    batch.submit(sequence(pieces))
    wait_for(lambda: batch.load == (1, 0))
    batch.submit(sequence(pieces))
    with pytest.raises(Busy) as caught:
        batch.submit(sequence(pieces))
    assert 1 <= caught.value.retry_after <= 60
    decoder.go.set()
    wait_for(lambda: sum(p.finish == "length" for p in pieces) == 2)
    assert "".join(p.text for p in pieces) == "AAAAAA"
    batch.stop()
    thread.join()


def test_a_step_that_fails_ends_its_sequences_and_not_the_engine() -> None:
    decoder, first, second = Stuck(), [], []  # type: ignore[var-annotated]
    batch, thread = running(decoder, queue=4)
    decoder.fail = True
    decoder.go.set()
    batch.submit(sequence(first))
    wait_for(lambda: first and first[-1].finish == "error")
    decoder.fail = False
    batch.submit(sequence(second))
    wait_for(lambda: second and second[-1].finish == "length")
    batch.stop()
    thread.join()


def test_stopping_ends_those_that_wait_with_an_error() -> None:
    decoder, pieces = Stuck(), []  # type: ignore[var-annotated]
    batch, thread = running(decoder, queue=4)
    batch.submit(sequence(pieces))
    wait_for(lambda: batch.load == (1, 0))
    batch.submit(sequence(pieces))
    batch.stop()
    decoder.go.set()
    thread.join()
    assert [p.finish for p in pieces if p.finish] == ["error", "error"]
    assert not batch.alive


@pytest.fixture(scope="module")
def decoder(model_dir: Path) -> Decoder:
    return Decoder(model_dir, slots=4, context=1024)


def prompt(decoder: Decoder, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return list(decoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


def greedy(decoder: Decoder, ids: list[int], steps: int) -> list[int]:
    slot, cached = decoder.claim(ids)
    ids = list(ids)
    for _ in range(steps):
        logits = decoder.step([Segment(slot, cached, ids[cached:])])
        cached = len(ids)
        ids.append(int(logits[0].argmax()))
    decoder.release(slot)
    return ids[-steps:]


def test_greedy_tokens_are_those_of_transformers(decoder: Decoder, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for question in QUESTIONS[:2]:
        ids = prompt(decoder, question)
        with torch.no_grad():
            found = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
            )
        assert greedy(decoder, ids, 24) == found[0, len(ids) :].tolist()


def test_a_beginning_that_is_cached_changes_nothing_and_is_shared_only_within_a_salt(decoder: Decoder) -> None:
    ids = prompt(decoder, QUESTIONS[6])
    slot, cached = decoder.claim(ids, "fresh")
    assert cached == 0
    whole = decoder.step([Segment(slot, 0, ids)])[0]
    other, copied = decoder.claim(ids, "fresh")  # the first is still in use, so its beginning is copied
    assert other != slot and copied == len(ids) - 1
    assert torch.allclose(decoder.step([Segment(other, copied, ids[copied:])])[0], whole, atol=1e-3)
    decoder.release(slot)
    decoder.release(other)
    again, stranger = decoder.claim(ids, "another tenant")
    assert stranger == 0
    decoder.release(again, forget=True)


@pytest.fixture(scope="module")
def base(model_dir: Path) -> Iterator[str]:
    """A real engine process; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "alignment.serve", "--model", str(model_dir), "--port", str(port)]
    env = {**os.environ, "NEWEL_ENGINE_API_KEY": KEY, "TQDM_DISABLE": "1"}
    process = subprocess.Popen([*command, "--served-model-name", NAME], cwd=ROOT, env=env)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: health(url) is not None or process.poll() is not None, 120)
    assert process.poll() is None
    yield url
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(15) in (0, -signal.SIGTERM)
    assert time.monotonic() - began < 10


def health(url: str) -> dict[str, Any] | None:
    import urllib.request

    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            return dict(json.load(response))
    except OSError:
        return None


@pytest.fixture
def sdk(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def ask(sdk: openai.OpenAI, text: str, **more: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 24, **more}
    return sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": text}], **options)


def test_the_model_is_listed_and_answers(sdk: openai.OpenAI) -> None:
    assert [m.id for m in sdk.models.list()] == [NAME]
    reply = ask(sdk, "What is the capital of France?")
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_has_openais_form_and_the_same_text(sdk: openai.OpenAI) -> None:
    chunks = list(ask(sdk, QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[0].choices[0].delta.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1])
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(sdk, QUESTIONS[0]).choices[0].message.content
    assert not any(c.usage for c in ask(sdk, QUESTIONS[0], stream=True, max_tokens=2))


def test_the_last_line_of_a_stream_is_done(base: str) -> None:
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True})
    raw = post(base, body)[1]
    assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b"[DONE]") == 1


def post(base: str, body: str, key: str = KEY) -> tuple[int, bytes]:
    import urllib.error
    import urllib.request

    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}/v1/chat/completions", body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_eight_at_once_each_say_what_they_say_alone(sdk: openai.OpenAI) -> None:
    alone = [ask(sdk, q).choices[0].message.content for q in QUESTIONS]
    together: dict[str, str] = {}

    def one(question: str) -> None:
        stream = ask(sdk, question, stream=True)
        together[question] = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    threads = [threading.Thread(target=one, args=(q,)) for q in QUESTIONS]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # they join while others write
    for thread in threads:
        thread.join()
    assert [together[q] for q in QUESTIONS] == alone


def test_a_seed_draws_the_same_reply_again(sdk: openai.OpenAI) -> None:
    texts = [ask(sdk, "Tell a joke.", temperature=1.2, seed=s).choices[0].message.content for s in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings_end_the_reply_and_do_not_show(sdk: openai.OpenAI) -> None:
    for streamed in (False, True):
        reply = ask(sdk, "Count from 1 to 10.", stop=["4", "nine"], max_tokens=60, stream=streamed)
        text = (
            "".join(c.choices[0].delta.content or "" for c in reply) if streamed else reply.choices[0].message.content
        )
        assert "3" in text and "4" not in text


def test_logprobs_of_the_first_token_give_the_probability_of_yes(sdk: openai.OpenAI) -> None:
    asked = "Is snow white? Answer with one word, yes or no."
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}
    whole = ask(sdk, asked, **options).choices[0].logprobs.content
    streamed = [
        t
        for c in ask(sdk, asked, stream=True, **options)
        if c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in whole] and len(whole) == 1
    top = whole[0].top_logprobs
    assert len(top) == 20 and top[0].token == whole[0].token and math.isclose(top[0].logprob, whole[0].logprob)
    chances = [math.exp(t.logprob) for t in top]
    assert chances == sorted(chances, reverse=True) and 0.5 < sum(chances) <= 1.0001
    assert any(t.token.strip().lower() in ("yes", "no") for t in top)
    assert bytes(whole[0].bytes).decode() == whole[0].token
    assert ask(sdk, asked, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(sdk, asked, max_tokens=1).choices[0].logprobs is None


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_is_no_longer_computed_for(base: str, streamed: bool) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    body = json.dumps({"model": NAME, "messages": messages, "stream": streamed, "seed": 1})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1]))) as client:
        client.sendall((head + body).encode())
        wait_for(lambda: (health(base) or {})["running"] == 1)
        if streamed:
            client.recv(1000)
    assert wait_for(lambda: (health(base) or {})["running"] == 0) < 3


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_length_exceeded", "messages"),
        ({"max_tokens": 8192}, 400, "context_length_exceeded", "messages"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, None, "messages.0.role"),
        ({"temperature": -1}, 400, None, "temperature"),
        ({"temperature": float("nan")}, 400, None, "temperature"),
        ({"top_logprobs": 21}, 400, None, "top_logprobs"),
        ({"n": 2}, 400, None, "n"),
        ({"tools": [{"type": "function"}]}, 400, None, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, None, "response_format.type"),
    ],
)
def test_bad_requests_get_openais_error(
    base: str, change: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], **change}
    found, raw = post(base, json.dumps(body))
    error = json.loads(raw)["error"]
    assert (found, error["code"], error["param"]) == (status, code, param), error
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '{"model": 3}', '{"model": "\udcff"}'.encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_what_is_no_request_at_all_gets_400(base: str, body: str) -> None:
    status, raw = post(base, body)
    assert status == 400 and json.loads(raw)["error"]["message"]


def test_nobody_else_on_the_host_gets_an_answer(base: str) -> None:
    assert post(base, "{}", key="guess")[0] == 401
    assert json.loads(post(base, "{}", key="")[1])["error"]["code"] == "invalid_api_key"
