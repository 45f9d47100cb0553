"""What is being said in one reply: its channels behind the output rules, and how the client is told them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial

import msgspec
from msgspec.structs import replace

from app import desk
from app.asking import Asked, definitions
from app.backends import Prompt
from app.errors import ApiError
from app.fleet import Release, Trail, affinity_of
from app.frames import BackendError, Delta, More
from app.passing import passed
from app.records import Ticket, Turn, new_id
from app.schemas import ChatRequest
from app.service import Service
from app.store import StoreDown
from app.thread import Thread
from app.tracing import Steps
from guardrails.arguments import plain
from guardrails.conversation import appended
from guardrails.reply import ARGUMENTS, CONTENT, REASONING, Piece, Reply
from guardrails.types import Action, Message, Policy, ToolMessage, Verdict
from guardrails.vault import Restorer, restore

REFUSAL = "refusal"


class Said(msgspec.Struct, frozen=True, gc=False):  # made for each token: a dataclass takes ten times as long
    """A piece of a reply as the client is told it: of what is said, of the reasoning, or of a tool call.

    channel: as in `guardrails.reply`, or `refusal`, for a rule's reply where JSON was asked for. place: of a tool call
    among those of the reply; id, name: with the first piece of it. choice: which of the replies to one request.
    logprobs: entries, in JSON, of the tokens that were given out with it. more: fields of the engine, as they are.
    """

    channel: str
    text: str = ""
    place: int = 0
    id: str = ""
    name: str = ""
    choice: int = 0
    logprobs: tuple[bytes, ...] = ()
    more: More | None = None

    @property
    def tells(self) -> bool:
        """True when there is something in it for a client."""
        return bool(self.text or self.name or self.logprobs or self.more)


class Telling:
    """What is being said in one turn. A client that does not stream is given nothing before the verdict."""

    def __init__(
        self,
        service: Service,
        policy: Policy,
        turn: Turn,
        asked: Asked,
        thread: Thread,
        request: ChatRequest,
        release: Release,
        started: float,
    ):
        self._service, self._policy, self.turn, self._thread = service, policy, turn, thread
        self._release, self._started = release, started
        self._lead = f"{thread.greeting}\n\n" if thread.news else ""
        self._said: list[str] = []
        self._outlets: dict[str, _Outlet] = {}
        self._values, self.request = asked.vault.values, request
        self.steps = Steps(guard_input=asked.seconds)
        offered = request.offered
        self._reply = Reply(
            policy.output,
            asked.context,
            offered=[one.name for one in definitions(asked.seen) if one.name in offered] if offered else (),
            structured=request.structured,
            restored=partial(restore, values=self._values, json=True),
            streamed=turn.streamed,
        )
        self._tokens = _Tokens() if request.logprobs else None
        self._more: More | None = None
        self._judging = 0.0
        self.closed = False

    def _say(self, text: str) -> Said:
        """The text as the client is told it, after what has to be said before anything else.

        It is noted as said with placeholders; the client is told what they stand for.
        """
        if self._lead:
            text, self._lead = self._lead + text, ""
        self._said.append(text)
        return self._tell(CONTENT, text)

    def _tell(self, channel: str, text: str, name: str = "") -> Said:
        """The text with what its placeholders stand for."""
        outlet = self._outlets.get(channel) or self._outlet(channel)
        return Said(channel, outlet.tell(text), outlet.place, outlet.id if name else "", name, self.turn.choice)

    def _outlet(self, channel: str) -> _Outlet:
        outlet = self._outlets.get(channel)
        if outlet is None:
            calls = sum(name.startswith(ARGUMENTS) for name in self._outlets)
            in_json = channel.startswith(ARGUMENTS) or (channel == CONTENT and self.request.structured)
            outlet = self._outlets[channel] = _Outlet(Restorer(self._values, json=in_json), calls)
        return outlet

    def _give(self, pieces: Sequence[Piece]) -> list[Said]:
        """The pieces as the client is told them; none that is empty."""
        said = []
        for channel, text, name in pieces:
            told = self._say(text) if channel == CONTENT else self._tell(channel, text, name)
            if told.tells:
                said.append(told)
        if self._tokens and (entries := self._tokens.released(self._reply)):
            spoken = next((i for i, one in enumerate(said) if one.channel == CONTENT), None)
            if spoken is None:
                said.append(Said(CONTENT, choice=self.turn.choice, logprobs=entries))
            else:
                said[spoken] = replace(said[spoken], logprobs=entries)
        return said

    def _rest(self, channel: str) -> Said:
        """What was held back at the end of a channel: it might have become a placeholder."""
        outlet = self._outlet(channel)
        return Said(channel, outlet.end(), outlet.place, choice=self.turn.choice)

    async def stop(self, verdict: Verdict, lead: str = "") -> list[Said]:
        """The reply of a rule, with a ticket's number when a person takes over.

        Where JSON was asked for, and none was said, it is a refusal: a client would read anything else as JSON. Raises
        ApiError 400 in place of a refusal where the client has asked for errors.
        """
        turn, mode = self.turn, self.request.block_mode
        turn.action, turn.rule = verdict.action.word, verdict.rule
        refused = verdict.action is Action.REFUSE
        if refused and mode == "error":
            raise ApiError(400, verdict.text, code="content_filter", param="messages")
        turn.finish_reason = "content_filter" if refused and mode != "stop" else "stop"
        reference = f"\n\n{await self._hand_over(verdict)}" if verdict.action is Action.ESCALATE else ""
        as_refusal = (self.request.structured or (refused and mode == "refusal")) and not "".join(self._said)
        turn.finish_reason = "stop" if as_refusal else turn.finish_reason
        told = [self._say(lead + verdict.text + reference), self._rest(CONTENT)]
        return [replace(one, channel=REFUSAL) for one in told] if as_refusal else told

    async def _hand_over(self, verdict: Verdict) -> str:
        """What the client is told about the turn's ticket: a new one, unless one like it waits for a person."""
        turn, route = self.turn, self._policy.routes[verdict.route]
        try:
            waiting = await self._service.store.open_ticket_of(turn.tenant, turn.conversation)
        except StoreDown:
            waiting = None
        if waiting and self._thread.owns(waiting) and _same_place(waiting, route.queue, route.priority):
            turn.ticket = waiting
            return f"A person already has this conversation. Your reference is {waiting.id}."
        turn.ticket = desk.hand_over(turn, verdict, route)
        return f"Your reference is {turn.ticket.id}."

    async def generate(self, prompt: Prompt) -> AsyncGenerator[Said, None]:
        """The settled pieces of the model's reply, until its end, until a rule stops it, or until it is too long.

        The first one comes with the engine's first token, and is empty when that is held back.
        """
        if not self.turn.streamed:
            await self.complete(prompt)
            return
        tokens, limit = 0, math.inf if "max_tokens" in prompt.sampling else self._service.settings.max_tokens
        steps, clock = self.steps, time.perf_counter
        with self._asking() as trail:
            asked = self._service.fleet.stream(prompt, self._release, self._affinity(prompt), trail)
            since = clock()
            async with aclosing(asked) as deltas:
                async for delta in deltas:
                    steps.waited += clock() - since
                    if not (tokens and delta.only_text):
                        self._note(delta)
                    if not delta.says:
                        since = clock()
                        continue
                    first = [] if tokens else [self._say("")]
                    if tokens + delta.pieces > limit:
                        delta = delta.first(int(limit - tokens))
                    tokens += delta.pieces
                    for said in self._with_more(first + self._give(await self._settled(delta))):
                        yield said
                    if self._reply.stopped:
                        break
                    if tokens >= limit:
                        self.turn.finish_reason = "length"
                        break
                    since = clock()
        self.turn.completion_tokens = self.turn.completion_tokens or tokens  # a stopped engine counts no more

    async def complete(self, prompt: Prompt) -> None:
        """Has the reply made in one piece. One that names no limit has ours, unless that does not fit behind the
        prompt: then the engine's own, which is lower."""
        fleet, affinity, limited = self._service.fleet, self._affinity(prompt), prompt
        if "max_tokens" not in prompt.sampling:
            sampling = {"max_tokens": self._service.settings.max_tokens, **prompt.sampling}
            limited = Prompt(prompt.messages, sampling, prompt.headers)
        trail, began = self._ask(), time.perf_counter()
        try:
            try:
                delta = await fleet.complete(limited, self._release, affinity, trail)
            except BackendError as error:
                if error.code != "context_length_exceeded" or limited is prompt:
                    raise
                delta = await fleet.complete(prompt, self._release, affinity, trail)
        finally:
            self.steps.waited += time.perf_counter() - began
            self._answered(trail)
        self._note(delta)
        await self._settled(delta)

    @contextmanager
    def _asking(self) -> Iterator[Trail]:
        """The trail of a request to the engines, to be noted however it ends."""
        trail = self._ask()
        try:
            yield trail
        finally:
            self._answered(trail)

    def _ask(self) -> Trail:
        """The trail of a request to the engines that begins now; `_answered` notes it."""
        self.steps.asked = time.perf_counter() - self._started
        return Trail()

    def _answered(self, trail: Trail) -> None:
        steps = self.steps
        steps.answered = time.perf_counter() - self._started
        steps.engine, steps.tries = trail.engine, trail.tries
        if trail.release:
            steps.pool, self.turn.release = trail.release.pool, trail.release.name

    def _affinity(self, prompt: Prompt) -> str:
        """What tells engines which of them has the beginning of the prompt in its cache, where there are several."""
        return affinity_of(self.turn.tenant, prompt.messages) if self._service.fleet.spreads(self._release) else ""

    def _note(self, delta: Delta) -> None:
        """Counts, and remembers, what comes with a piece."""
        turn = self.turn
        turn.prompt_tokens = delta.prompt_tokens or turn.prompt_tokens
        turn.cached_tokens = delta.cached_tokens or turn.cached_tokens
        turn.completion_tokens = delta.completion_tokens or turn.completion_tokens
        turn.finish_reason = delta.finish_reason or turn.finish_reason
        if delta.says:
            turn.first_token_ms = turn.first_token_ms or self._elapsed()
        if self._tokens and delta.logprobs:
            self._tokens.add(delta)
        if delta.more:
            self._more = delta.more.joined(self._more)

    def _with_more(self, said: list[Said]) -> list[Said]:
        """The pieces, the first with the engine's own fields that came meanwhile and hold no free text."""
        if self._more is None:
            return said
        safe, self._more = passed(self._more), None
        if safe:
            return [replace(said[0], more=safe), *said[1:]] if said else [Said(CONTENT, more=safe)]
        return said

    async def _settled(self, delta: Delta) -> list[Piece]:
        """What may be given out now that `delta` has come."""
        began = time.perf_counter()
        pieces = self._reply.feed(REASONING, delta.reasoning) if delta.reasoning else []
        pieces += self._reply.feed(CONTENT, delta.text) if delta.text else []
        for call in delta.calls:
            pieces += self._reply.feed(f"{ARGUMENTS}:{call.number}", call.arguments, call.name)
        while self._reply.asking:
            pieces += await self._reply.ask()
        self._judging += time.perf_counter() - began
        return pieces

    async def finish(self, asked: Verdict) -> list[Said]:
        """The end of the model's reply: its last words, what the rules add, or what they say instead."""
        turn, reply = self.turn, self._reply
        began = time.perf_counter()
        last, verdict = await reply.finish()
        self.steps.guard_output = self._judging + time.perf_counter() - began
        self._service.metrics.guarded("output", self.steps.guard_output)
        turn.output = verdict
        turn.withheld_said = reply.withheld if verdict.action >= Action.REDACT else ""
        if verdict.action.stops:
            said = self._give(last) if turn.streamed else []
            return [*said, *await self.stop(verdict, "\n\n" if turn.streamed and verdict.kept else "")]
        strictest = asked if asked.action > verdict.action else verdict
        turn.action, turn.rule = strictest.action.word, strictest.rule
        called = reply.called
        if turn.finish_reason != "length":
            turn.finish_reason = "tool_calls" if called else turn.finish_reason.replace("tool_calls", "stop")
        said = self._give(last if turn.streamed else reply.whole)
        if (ending := self._ending(asked, verdict, bool(called))) or self._lead:
            said += self._give([Piece(CONTENT, ending)])
        rest = [self._rest(channel) for channel in self._outlets] if self._values else []
        return self._with_more([*said, *rest])

    def _ending(self, asked: Verdict, verdict: Verdict, called: bool) -> str:
        """The lines that rules add to what is said; JSON has none, nor has a reply that only calls tools."""
        if self.request.structured or (called and not verdict.kept.strip()):
            return ""
        lines = [line for line in appended(self._policy.input, asked) if line not in verdict.closing]
        return verdict.closing + "".join([f"\n\n{line}" for line in lines])

    def end(self, error: str = "") -> None:
        """Completes the turn as it was said, once."""
        self.closed = True
        turn, reply = self.turn, self._reply
        turn.error = error
        turn.said = "".join(self._said)
        if turn.streamed or (turn.output and not turn.output.action.stops and not error):
            turn.reasoning = reply.released(REASONING)
            turn.calls = tuple([self._call(channel, reply.released(channel)) for channel in reply.called])
        turn.guard_input_ms = round(self.steps.guard_input * 1000, 3) if turn.input else None
        turn.guard_output_ms = round(self.steps.guard_output * 1000, 3) if turn.output else None
        turn.total_ms = self._elapsed()
        if turn.output is None:
            turn.withheld_said = reply.withheld
        if (turn.said or turn.calls) and not error:
            after = (*self._thread.messages, *self._told())
            turn.tail_hash = self._service.fingerprint(turn.tenant, turn.subject, after)

    @property
    def news(self) -> Sequence[Ticket]:
        """The people's answers that the client was told in this turn."""
        return () if self.turn.error else self._thread.news

    def _told(self) -> list[Message]:
        """The reply as the client will send it back."""
        said = Message("assistant", "".join(self._outlet(CONTENT).told))
        calls = [self._call(one, plain("".join(self._outlet(one).told))) for one in self._reply.called]
        return [*([said] if said.content or not calls else []), *calls]

    def _call(self, channel: str, arguments: str) -> ToolMessage:
        return ToolMessage("assistant", arguments, self._outlet(channel).id, self._reply.name(channel))

    def _elapsed(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)


def _same_place(ticket: Ticket, queue: str, priority: str) -> bool:
    return (ticket.queue, ticket.priority) == (queue, priority)


class _Outlet:
    """Where the client is told one channel, with what its placeholders stand for; for a tool call, which one it is."""

    __slots__ = ("_id", "_restorer", "place", "told")

    def __init__(self, restorer: Restorer, place: int):
        self._restorer, self.place, self._id = restorer, place, ""
        self.told: list[str] = []

    @property
    def id(self) -> str:
        """The id of this tool call."""
        self._id = self._id or new_id("call_")
        return self._id

    def tell(self, text: str) -> str:
        """What the client is told now."""
        self.told.append(self._restorer.feed(text))
        return self.told[-1]

    def end(self) -> str:
        """The rest of it."""
        self.told.append(self._restorer.finish())
        return self.told[-1]


class _Tokens:
    """Log-probabilities that wait until their tokens are given out; those of withheld or redacted text never are."""

    __slots__ = ("_at", "_waiting")

    def __init__(self) -> None:
        self._at, self._waiting = 0, deque[tuple[int, int, bytes]]()

    def add(self, delta: Delta) -> None:
        """Takes what came with a piece: each token at its place, or all of them at all of it where they do not tell."""
        start, self._at = self._at, self._at + len(delta.text)
        told = sum(len(token) for token, _ in delta.logprobs) == len(delta.text)
        for token, entry in delta.logprobs:
            end = start + len(token) if told else self._at
            self._waiting.append((start, end, entry))
            start = end if told else start

    def released(self, reply: Reply) -> tuple[bytes, ...]:
        """The entries of the tokens that were given out since, as they were written."""
        cursor, hidden = reply.cursor(CONTENT), reply.redacted(CONTENT)
        out = []
        while self._waiting and self._waiting[0][1] <= cursor:
            start, end, entry = self._waiting.popleft()
            if not any(start < stop and begin < end for begin, stop in hidden):
                out.append(entry)
        return tuple(out)
