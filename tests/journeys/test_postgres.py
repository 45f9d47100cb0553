"""The gateway on a real PostgreSQL: what its texts may hold, and that it goes on when the server was away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.fakes import FakeUpstream, Script
from tests.gateway import running
from tests.postgres import Cluster, programs

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    found = programs()
    if found is None:
        reason = "no PostgreSQL programs on this machine (Debian: apt-get install postgresql)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    cluster = Cluster(found)
    cluster.start()
    yield cluster
    cluster.remove()


async def test_a_turn_with_null_bytes_and_feedback_on_it(cluster: Cluster, tmp_path: Path) -> None:
    database = cluster.create_database("newel_journey")
    async with FakeUpstream(Script(["a\x00b"])) as upstream, running(tmp_path, upstream, database=database) as gateway:
        reply = await gateway.ask("What is \x00 this?", user="a\x00b")
        assert reply.choices[0].message.content == "a\x00b"
        turn = await gateway.turn(reply.id)
        assert (turn.asked, turn.said) == ("What is \ufffd this?", "a\ufffdb")
        again = await gateway.ask("What is \x00 this?", "a\x00b", "And?", user="a\x00b")
        assert (await gateway.turn(again.id)).conversation == turn.conversation
        body = {"target": reply.id, "comment": "a\x00b", "rating": "up"}
        assert (await gateway.json("POST", "/v1/feedback", json=body))[0] == 200
        assert (await gateway.json("POST", "/v1/feedback", json=body | {"target": "\x00"}))[0] == 404
        assert (await gateway.json("GET", "/v1/tickets/%00"))[0] == 404
        assert (await gateway.raw("GET", "/v1/models", key="nk-\u00ff"))[0] == 401


async def test_a_server_that_was_away(cluster: Cluster, tmp_path: Path) -> None:
    database = cluster.create_database("newel_away")
    async with FakeUpstream() as upstream, running(tmp_path, upstream, database=database) as gateway:
        bold = await gateway.tenant("bold", when="answer")
        for key in (bold, gateway.key):
            await gateway.ask("Hello", key=key)
        cluster.stop()
        try:
            with pytest.raises(openai.InternalServerError) as caught:
                await gateway.ask("Hello")
            assert caught.value.code == "store_down"
            reply = await gateway.ask("Hello again", key=bold)
        finally:
            cluster.start()
        turn = await gateway.turn(reply.id, "bold")
        assert (turn.asked, turn.said) == ("Hello again", "Hello there.")
        assert (await gateway.ask("Hello")).choices[0].message.content == "Hello there."
