"""Rewards by name, constraints with weights that find themselves, and signs of reward hacking."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from alignment.monitor import FIRST, Bounds, Hacked, Monitor, signs_of
from alignment.rewards import Lagrange, Mixed, RewardError, Said, Source, built
from alignment.rollout import Reply
from guardrails.types import Message


def said(*texts: str) -> list[Said]:
    reply = Reply((1,), (2,), (0.0,), "stop")
    return [Said((Message("user", "What does Jane earn?"),), text, reply) for text in texts]


def shortness(replies: Sequence[Said]) -> list[float]:
    return [1.0 / len(one.text) for one in replies]


def test_rules_reward_what_they_name() -> None:
    pattern = built(Source(name="sure", kind="pattern", pattern=r"\bof course\b"))
    assert list(pattern(said("Of course!", "No."))) == [1.0, 0.0]
    length = built(Source(name="long", kind="length", most=3))
    assert list(length(said("abc", "abcde"))) == [0, -0.002]
    named = built(Source(name="own", kind="python", function="tests.alignment.test_rewards:shortness"))
    assert list(named(said("ab"))) == [0.5]


def test_our_guardrails_are_a_reward() -> None:
    guard = built(Source(name="safe", kind="guard", policy="base"))
    assert list(guard(said("Ask your manager.", "Her card is 4111 1111 1111 1111."))) == [1.0, 0.0]


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """A reward server that answers the length of each text, or what is put behind the requests it has seen."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(asked)
            rewards = [len(one["text"]) for one in asked["replies"]][: 1 if "short" in self.path else None]
            body = json.dumps({"rewards": rewards}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", seen
        http.shutdown()


def test_a_server_is_asked_with_prompts_and_texts(server: tuple[str, list[Any]]) -> None:
    url, seen = server
    assert list(built(Source(name="far", kind="http", url=url))(said("ab", "abc"))) == [2.0, 3.0]
    prompt = [{"role": "user", "content": "What does Jane earn?"}]
    assert seen == [{"replies": [{"prompt": prompt, "text": text} for text in ("ab", "abc")]}]
    with pytest.raises(RewardError, match=r"the reward 'far' at .*/short answered no number for each of 2 replies"):
        built(Source(name="far", kind="http", url=f"{url}/short"))(said("ab", "abc"))
    with pytest.raises(RewardError, match=r"the reward 'far' at http://127.0.0.1:9: URLError"):
        built(Source(name="far", kind="http", url="http://127.0.0.1:9"))(said("ab"))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"kind": "guard"}, "the reward 'x' is of kind guard and needs `policy`"),
        ({"kind": "guard", "policy": "nowhere"}, "the policy 'nowhere' of a reward cannot be loaded"),
        ({"kind": "python", "function": "tests.nothing:here"}, "the reward 'x': there is no tests.nothing:here"),
    ],
)
def test_a_reward_that_cannot_be_had_says_why(source: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        built(Source(name="x", **source))


def constant(value: float) -> Any:
    return lambda replies: [value] * len(replies)


def test_a_score_is_the_weighted_sum_less_what_constraints_cost() -> None:
    sources = [Source(name="a", kind="length", weight=2.0), Source(name="c", kind="pattern", pattern="x", limit=0.1)]
    mixed = Mixed(sources, {"a": constant(3.0), "c": constant(1.0)}, Lagrange(first=0.5))
    scores, found = mixed(said("one", "two"))
    assert scores == pytest.approx([(2 * 3 - 0.5) / 1.5] * 2) and found == {"a": [3.0, 3.0], "c": [1.0, 1.0]}


def test_the_weight_of_a_constraint_rises_while_it_is_broken_and_falls_while_it_is_kept() -> None:
    mixed = Mixed(
        [
            Source(name="c", kind="pattern", pattern="x", limit=0.2),
            Source(name="g", kind="guard", policy="p", limit=0.9),
        ], {}, Lagrange(first=1.0, rate=1.0, window=10, most=3.0, delay=1),
    )  # fmt: skip
    assert mixed.settle({"c": 0.9, "g": 1.0}, 10) == {"constraint/c": 1.0, "constraint/g": 1.0}  # it waits
    first = mixed.settle({"c": 0.9, "g": 1.0}, 10)
    assert first["constraint/c"] > 1 > first["constraint/g"]  # of the guard at least 0.9 of the replies pass
    for _ in range(10):
        last = mixed.settle({"c": 0.9, "g": 1.0}, 10)
    assert last["constraint/c"] == 3.0
    again = Mixed(mixed.sources, {}, mixed.lagrange)
    again.restore(json.loads(json.dumps(mixed.state())))
    assert again.settle({"c": 0.0, "g": 0.0}, 10) == mixed.settle({"c": 0.0, "g": 0.0}, 10)


HEALTHY = {"words": 10.0, "repeated": 0.0, "distinct": 0.9, "kl": 1.0, "held_out": 0.5, "spread": 1.0}


@pytest.mark.parametrize(
    ("sign", "value"), [("words", 31.0), ("repeated", 0.4), ("distinct", 0.2), ("kl", 60.0), ("held_out", -0.1)]
)
def test_a_sign_beyond_its_bound_for_long_ends_the_run(sign: str, value: float) -> None:
    monitor = Monitor(Bounds(patience=3))
    for _ in range(FIRST):
        monitor.look(HEALTHY)
    for _ in range(2):
        monitor.look(HEALTHY | {sign: value})
    monitor.look(HEALTHY)  # once within the bound, it begins anew
    for _ in range(2):
        monitor.look(HEALTHY | {sign: value})
    with pytest.raises(Hacked, match=f"{sign} is .* for 3 updates: .* samples.jsonl"):
        monitor.look(HEALTHY | {sign: value})


def test_signs_tell_lengths_repetition_and_variety() -> None:
    found = signs_of(["a b c d a b c d a b c d", "one two three"])
    assert found["words"] == 7.5
    assert found["repeated"] == pytest.approx((9 - 4) / 9 / 2)
    assert found["distinct"] == pytest.approx(6 / 13)
    assert signs_of([""]) == {"words": 0.0, "repeated": 0.0, "distinct": 0.0}
