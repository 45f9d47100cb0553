"""Logged turns as what a policy judges once more."""

from __future__ import annotations

from app.store.replay import Logged
from guardrails.replay import Exchange, Hidden, hidden
from guardrails.types import Action, Message


def exchange(logged: Logged) -> Exchange:
    """What was asked and written, raw, and what was decided.

    What was said before is as the policy of that time let it be kept. Only the newest message is raw.
    """
    turn = logged.turn
    asked = () if turn.results else (Message("user", turn.withheld_asked or turn.asked),)
    hits = turn.input.hits if turn.input else ()
    newest = max((hit.message for hit in hits), default=-1)  # a place in the conversation as it came
    redacted = hidden(hits, newest) if newest >= len(turn.history) else frozenset()
    written = turn.withheld_said or (turn.said if turn.output else "")
    return Exchange(
        id=turn.id,
        messages=(*turn.history, *asked),
        trusted=len(turn.history) - len(turn.results) if logged.known else 0,
        draft=written or None,
        action=Action[turn.action.upper()],
        rule=turn.rule,
        hidden=Hidden(redacted, hidden(turn.output.hits) if turn.output else frozenset()),
    )
