"""A reply that is more than one text: what is said, the reasoning before it, the arguments of tool calls.

Every one of them passes the same rules, each as a text of its own; a stop in any of them ends the whole reply.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from guardrails.engine import Guard
from guardrails.types import Action, Context, Hit, Rule, Verdict

CONTENT, REASONING, ARGUMENTS = "content", "reasoning", "arguments"


class Reply:
    """One reply on its way out: `feed` it the pieces of its channels, release what comes back, `finish`.

    A channel is `content`, `reasoning`, or `arguments:N` for the arguments of the tool call of that number, which are
    JSON: placeholders are escaped as the inside of a string there. Only what is said gets lines appended.
    """

    def __init__(self, rules: Sequence[Rule], context: Context | None = None):
        self._rules, self._context = rules, context
        self._guards: dict[str, Guard] = {}
        self._stopped = ""

    @property
    def stopped(self) -> bool:
        """True when nothing more will be released in any channel."""
        return bool(self._stopped)

    def draft(self, channel: str = CONTENT) -> str:
        """Everything that was fed to a channel, as it was written."""
        return self._guards[channel].draft if channel in self._guards else ""

    def feed(self, channel: str, delta: str) -> str:
        """What may be released in this channel now that `delta` has come."""
        guard = self._guard(channel)
        return "" if self.stopped else self._released(channel, guard, guard.feed(delta))

    @property
    def asking(self) -> str:
        """The channel in which a rule waits to be asked about a sentence that is complete, or empty."""
        return next((name for name, guard in self._guards.items() if not self.stopped and guard.asking), "")

    async def ask(self) -> tuple[str, str]:
        """(the channel that was waiting, what may be released in it now)."""
        name = self.asking
        return name, self._released(name, self._guards[name], await self._guards[name].ask()) if name else ""

    async def finish(self) -> tuple[dict[str, str], Verdict]:
        """(the last piece of each channel, the verdict on the reply): everything ends here."""
        self._guard(CONTENT)
        pieces: dict[str, str] = {}
        verdicts: dict[str, Verdict] = {}
        names = [self._stopped] if self.stopped else list(self._guards)
        for name in names:
            piece, verdicts[name] = await self._guards[name].finish()
            if not self.stopped:
                pieces[name] = piece
            if verdicts[name].action.stops:
                self._stopped = self._stopped or name
                break
        return pieces, self._verdict(verdicts)

    def _guard(self, channel: str) -> Guard:
        if channel not in self._guards:
            escape = _inside if channel.startswith(ARGUMENTS) else str
            self._guards[channel] = Guard(self._rules, self._context, escape)
        return self._guards[channel]

    def _released(self, channel: str, guard: Guard, piece: str) -> str:
        if guard.stopped:
            self._stopped = channel
        return piece

    def _verdict(self, verdicts: dict[str, Verdict]) -> Verdict:
        hits: tuple[Hit, ...] = tuple(hit for verdict in verdicts.values() for hit in verdict.hits)
        if self._stopped:
            stop = verdicts[self._stopped]
            kept = stop.kept if self._stopped == CONTENT else ""
            return Verdict(stop.action, stop.text, kept, stop.rule, stop.route, hits)
        said = verdicts[CONTENT]
        strictest = max(verdicts.values(), key=lambda verdict: verdict.action)
        action = strictest.action if strictest.action > Action.APPEND else said.action
        return Verdict(action, said.text, said.kept, (strictest if action > said.action else said).rule, hits=hits)


def _inside(placeholder: str) -> str:
    """The placeholder as it is written inside a JSON string."""
    return json.dumps(placeholder, ensure_ascii=False)[1:-1]
