"""The fakes keep their word, judged by the real OpenAI SDK; a fake that lies would make other tests lie."""

import asyncio
import math

import aiohttp
import openai
import pytest

from tests.fakes import FakeReceiver, FakeUpstream, Script, serve

HELLO = [{"role": "user", "content": "two words"}]


def client(upstream: FakeUpstream) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=upstream.url, api_key="sk-test", max_retries=0)


async def test_a_reply_is_the_same_whole_and_streamed() -> None:
    async with FakeUpstream(Script(["Hel", 0.01, "lo"])) as upstream, client(upstream) as sdk:
        whole = await sdk.chat.completions.create(model="m", messages=HELLO)
        stream = await sdk.chat.completions.create(
            model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == "Hello"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert whole.usage == chunks[-1].usage
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 2)
    assert upstream.seen[0].headers["authorization"] == "Bearer sk-test"
    assert [request.gone for request in upstream.seen] == [False, False]


async def test_scripts_are_taken_from_the_queue_then_by_model_then_by_default() -> None:
    async with FakeUpstream(Script(["default"])) as upstream, client(upstream) as sdk:
        upstream.models["named"] = Script(["named"])
        upstream.queue.append(Script(["queued"]))
        replies = [await sdk.chat.completions.create(model=model, messages=HELLO) for model in ("named", "named", "x")]
    assert [reply.choices[0].message.content for reply in replies] == ["queued", "named", "default"]


async def test_an_error_comes_before_the_first_byte_with_its_retry_after() -> None:
    async with FakeUpstream(Script(status=503, retry_after="7")) as upstream, client(upstream) as sdk:
        with pytest.raises(openai.InternalServerError) as error:
            await sdk.chat.completions.create(model="m", messages=HELLO, stream=True)
    assert error.value.response.headers["retry-after"] == "7"
    assert not upstream.seen[0].gone


async def test_an_error_frame_comes_after_the_deltas() -> None:
    async with FakeUpstream(Script(["a"], end="error", message="out of memory")) as upstream, client(upstream) as sdk:
        stream = await sdk.chat.completions.create(model="m", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            async for _ in stream:
                pass
    assert upstream.seen[0].sent == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cut_ends_the_connection_without_a_last_chunk(stream: bool) -> None:
    async with FakeUpstream(Script(["a"], end="cut")) as upstream, aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            async with http.post(f"{upstream.url}/chat/completions", json={"model": "m", "stream": stream}) as response:
                await response.read()
        assert not (await upstream.seen[0].finished()).gone


@pytest.mark.parametrize("script", [Script(wait=math.inf), Script(["a"], end="hang"), Script(["a", 60.0, "b"])])
async def test_a_client_that_hangs_up_is_noticed(script: Script) -> None:
    async def ask() -> None:
        async with http.post(f"{upstream.url}/chat/completions", json={"stream": True}) as response:
            await response.read()

    async with FakeUpstream(script) as upstream, aiohttp.ClientSession() as http:
        asking = asyncio.create_task(ask())
        seen = await upstream.asked()
        await asyncio.sleep(0.05)
        assert not seen.over.is_set()
        asking.cancel()
        assert (await seen.finished(1.0)).gone


@pytest.mark.parametrize("yes", [0.0, 0.25, 0.5, 1.0])
async def test_a_grader_reads_the_probability_of_yes(yes: float) -> None:
    async with FakeUpstream(yes=yes) as upstream, client(upstream) as sdk:
        reply = await sdk.chat.completions.create(
            model="m", messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=20
        )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    chance = {token.token: math.exp(token.logprob) for token in logprobs.content[0].top_logprobs}
    assert chance["Yes"] / (chance["Yes"] + chance["No"]) == pytest.approx(yes)
    assert (len(upstream.graded), len(upstream.seen)) == (1, 0)


async def test_a_receiver_fails_as_told_and_then_accepts() -> None:
    async with FakeReceiver(500, (429, {"Retry-After": "1"})) as receiver, aiohttp.ClientSession() as http:
        statuses = []
        for number in range(3):
            async with http.post(receiver.url, json={"n": number}) as response:
                statuses.append((response.status, response.headers.get("Retry-After")))
        delivered = await receiver.arrived()
    assert statuses == [(500, None), (429, "1"), (204, None)]
    assert [delivery.json for delivery in delivered] == [{"n": 2}]
    assert len(receiver.deliveries) == 3


async def test_serve_runs_the_lifespan_and_the_app() -> None:
    life: list[str] = []

    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                life.append(word)
                await send({"type": f"lifespan.{word}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    async with serve(app) as base, aiohttp.ClientSession() as http, http.get(base) as response:
        assert await response.read() == b"here"
        assert life == ["startup"]
    assert life == ["startup", "shutdown"]


async def test_serve_says_that_an_app_did_not_start() -> None:
    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(RuntimeError, match="did not start"):
        async with serve(app):
            pass
