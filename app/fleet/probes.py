"""Looks at engines: whether they are there, which models they list, and whether they can write one token.

`/health` of vLLM says that the process lives, not that it answers; so an engine that nobody has asked for a while, or
that failed, is asked for one token before it is given requests again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
import orjson

from app.backends import Prompt, Upstream
from app.breaker import BreakerOpen
from app.fleet.members import Caller, Member
from app.frames import BackendError
from guardrails.types import Message

Look = Callable[[Upstream], Awaitable[frozenset[str] | None]]
"""Returns the models that an engine lists, None when it has no list; raises BackendError."""
MISSES = 2
"""Looks in a row that come to nothing until an engine is taken to be down; a refused connection is enough by itself."""
SECONDS = 5.0
"""How long a look may take."""
BREATH = 1.0
"""Seconds between two looks at an engine that is down, and until one that failed is tried."""
MOST = 4 << 20
"""Bytes of a list of models."""
_TRIAL = Prompt((Message("user", "Hi"),), {"max_tokens": 1})


async def look(session: aiohttp.ClientSession, upstream: Upstream) -> frozenset[str] | None:
    """The models that an engine lists, None when it has no list; raises BackendError when it is not well."""
    headers = {"authorization": f"Bearer {upstream.api_key}"} if upstream.api_key else {}
    root = upstream.url.rstrip("/")
    try:
        async with asyncio.timeout(SECONDS):
            status, _ = await _got(session, f"{root.removesuffix('/v1')}/health", headers)
            if status not in (200, 404, 405):
                raise BackendError("broken", f"/health answered with status {status}")
            status, body = await _got(session, f"{root}/models", headers)
    except TimeoutError:
        raise BackendError("timeout", "it did not answer in time") from None
    except aiohttp.ClientConnectorError:
        raise BackendError("unreachable", "it cannot be reached") from None
    except (aiohttp.ClientError, ConnectionError):
        raise BackendError("broken", "the connection broke off") from None
    if status == 404:
        return None
    if status != 200:
        raise BackendError("broken", f"/models answered with status {status}")
    return _names(body)


async def _got(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    async with session.get(url, headers=headers, allow_redirects=False) as response:
        body = await response.content.read(MOST)
        while more := await response.content.read(MOST - len(body)):
            body += more
        return response.status, body


def _names(body: bytes) -> frozenset[str]:
    try:
        return frozenset(str(entry["id"]) for entry in orjson.loads(body)["data"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        raise BackendError("broken", "/models did not answer as an OpenAI-compatible server does") from None


class Watch:
    """Looks at one engine again and again.

    models: what the gateway asks the engine for, the most important first. changed: called when it came or went.
    every, trial_every: seconds between looks, and between trials of an idle engine. patience: seconds for a token.
    """

    def __init__(
        self,
        member: Member,
        caller: Caller,
        look: Look,
        models: Callable[[], Sequence[str]],
        clock: Callable[[], float],
        changed: Callable[[], None],
        *,
        every: float,
        trial_every: float,
        patience: float,
        listed: bool,
    ):
        self._member, self._caller, self._look, self._models = member, caller, look, models
        self._clock, self._changed = clock, changed
        self._every, self._trial_every, self._patience, self._listed = every, trial_every, patience, listed

    async def run(self) -> None:
        """Never returns. Pauses differ by chance, so that gateways and engines do not fall into step."""
        member = self._member
        while True:
            await self.once()
            quick = not member.ready or member.breaker.open
            pause = min(BREATH, self._every) if quick else self._every
            try:
                async with asyncio.timeout(pause * random.uniform(0.8, 1.2)):  # noqa: S311 (jitter, no secret)
                    await member.wake.wait()
                await asyncio.sleep(min(BREATH, self._every))  # a failure just now: an engine's hiccup may be over
            except TimeoutError:
                pass
            member.wake.clear()

    async def once(self) -> None:
        """One look, and a trial where one is due."""
        member, was = self._member, self._member.ready
        try:
            if not member.supervised:
                await self._seen()
            if self._due():
                await self._trial()
            elif not member.supervised:
                self._well()
        except BackendError as error:
            self._missed(error)
        if member.ready != was:
            self._changed()

    async def _seen(self) -> None:
        """Notes which models the engine lists; raises BackendError when it is not well or lists none of ours."""
        member = self._member
        names = await self._look(member.upstream(""))
        member.models = names if self._listed else None
        if member.models is not None and not member.models & set(wanted := self._models()):
            raise BackendError("broken", f"it lists none of the models that it is asked for: {', '.join(wanted)}")

    def _due(self) -> bool:
        """True when it has to write a token before requests go to it: it was down, it failed, or nobody asked it."""
        member = self._member
        if member.breaker.open:
            return not member.breaker.shut and (member.ready or not member.supervised)
        if not self._trial_every or member.supervised:
            return False
        return not member.probed or (not member.in_flight and self._clock() - member.heard >= self._trial_every)

    async def _trial(self) -> None:
        """Asks for one token; raises BackendError."""
        member = self._member
        model = next((one for one in self._models() if member.models is None or one in member.models), "")
        try:
            member.breaker.admit()
            async with asyncio.timeout(self._patience):
                await self._caller.complete(member.upstream(model), _TRIAL)
        except BreakerOpen:
            return
        except TimeoutError:
            member.breaker.failed()
            raise BackendError("timeout", "it wrote no token in time") from None
        except BackendError as error:
            if error.fault == "busy":
                member.fails(error, self._clock())
                return  # it lives, and says so
            member.breaker.failed()
            raise
        except BaseException:
            member.breaker.unknown()
            raise
        member.answers(self._clock())
        self._well()

    def _well(self) -> None:
        member = self._member
        member.probed, member.misses, member.last_error = True, 0, ""

    def _missed(self, error: BackendError) -> None:
        """An engine that was not well twice, or is not there, gets no more requests.

        An answer to a request in between counts for more: it is only too busy for us.
        """
        member = self._member
        member.misses += 1
        member.last_error = f"{error.fault}: {error.message}"
        if error.fault == "unreachable" or member.misses >= MISSES:
            member.probed = False
