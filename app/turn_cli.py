"""`newel turn`: one exchange and every decision on the way, for those who have to say why it went as it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.console import Console

from app.records import Feedback, Turn
from app.settings import ModelSettings
from app.shell import Json, actor, cell, find_turn, print_json, read_settings, stored
from app.store import Store
from app.tracing import trace_id

UNEXPLAINED = frozenset(
    ("withheld_asked", "withheld_said", "input", "output", "head_hash", "tail_hash", "subject", "history", "ticket")
)
"""What is left out of a turn: other classes of text, what is shown otherwise, and what says nothing to a person."""


def show_turn(
    id: Annotated[str, typer.Argument(help="The completion's id, chatcmpl-...")],
    withheld: Annotated[bool, typer.Option("--withheld", help="Also the texts that were withheld; audited.")] = False,
    reason: Annotated[str, typer.Option(help="Why the withheld texts are needed.")] = "",
    as_json: Json = False,
) -> None:
    """Explains one exchange. Its verdicts, rules and times, and the texts as the policy let them be kept."""
    if withheld and not reason.strip():
        raise typer.BadParameter("withheld text is shown only for a reason: add --reason", param_hint="--withheld")
    models = read_settings().models

    async def look(store: Store) -> dict[str, Any]:
        turn = await find_turn(store, id)
        told = explained(turn) | _costs(turn, models) | _beside(turn, await store.turns(turn.conversation, turn.tenant))
        told["feedback"] = [_opinion(one) for one in await store.feedback(turn.id, turn.tenant)]
        if withheld:
            raw = await store.withheld(id, turn.tenant, actor(), reason)
            told |= {f"withheld_{kind}": text for kind, text in raw.items()}
        return told

    told = stored(look)
    if as_json:
        print_json(told)
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(told):
        console.print(line, markup=False)


def explained(turn: Turn) -> dict[str, Any]:
    """What was decided about a turn and why, as plain values, without what was withheld."""
    shown = {one.name: getattr(turn, one.name) for one in fields(turn) if one.name not in UNEXPLAINED}
    calls = [{"id": call.call, "name": call.name, "arguments": call.content} for call in turn.calls]
    verdicts = [
        {"stage": stage, "action": verdict.action.word, "rule": verdict.rule, "route": verdict.route}
        for stage, verdict in (("input", turn.input), ("output", turn.output))
        if verdict
    ]
    hits = [
        {"stage": stage, "rule": hit.rule, "action": hit.action.word, "mode": hit.mode, "broken": hit.broken,
         "found": [f"{found.label} at {found.start}-{found.end}" for found in hit.findings]}
        for stage, hit in turn.hits
    ]  # fmt: skip
    shown |= {"trace": trace_id(turn.trace), "calls": calls, "ticket": turn.ticket.id if turn.ticket else ""}
    if (ticket := turn.ticket) is not None:
        shown |= {f"ticket_{name}": getattr(ticket, name) for name in ("state", "queue", "priority", "due_at")}
    return shown | {"token_ms": _token_ms(turn), "verdicts": verdicts, "hits": hits}


def _token_ms(turn: Turn) -> float | None:
    """The mean time between two tokens of a stream."""
    if turn.total_ms is None or turn.first_token_ms is None or not turn.streamed or turn.completion_tokens < 2:
        return None
    return round((turn.total_ms - turn.first_token_ms) / (turn.completion_tokens - 1), 3)


def _costs(turn: Turn, models: Mapping[str, ModelSettings]) -> dict[str, float | None]:
    """What the turn costs by the prices of today; the prompt counts with the first of several replies."""
    model = models.get(turn.model)
    if model is None or not (model.prompt_price or model.completion_price):
        return {"cost": None}
    prompt = 0 if turn.choice else turn.prompt_tokens
    return {"cost": (prompt * model.prompt_price + turn.completion_tokens * model.completion_price) / 1e6}


def _beside(turn: Turn, conversation: Sequence[Turn]) -> dict[str, list[dict[str, Any]]]:
    """The other replies to the same request, and what the client asked again since it got no answer."""
    request = turn.id.removesuffix(f"-{turn.choice}")
    others = [one for one in conversation if one.id != turn.id]
    siblings = [one for one in others if one.id.removesuffix(f"-{one.choice}") == request]
    again = [
        one
        for one in others
        if one not in siblings
        and (one.retry_of or turn.retry_of)
        and (one.asked, len(one.history)) == (turn.asked, len(turn.history))
    ]
    return {"siblings": [_brief(one) for one in siblings], "attempts": [_brief(one) for one in again]}


def _brief(turn: Turn) -> dict[str, Any]:
    names = ("id", "choice", "retry_of", "action", "rule", "error", "total_ms")
    return {name: getattr(turn, name) for name in names}


def _opinion(said: Feedback) -> dict[str, Any]:
    """A judgement without the words of whoever gave it."""
    return {name: getattr(said, name) for name in ("kind", "value", "choice", "other", "source", "created_at")}


def _lines(told: Mapping[str, Any]) -> Iterator[str]:
    """The same for people: a line for each value that says something."""
    for name, value in told.items():
        if isinstance(value, list):
            yield from (_LISTED[name](one) for one in value)
        elif value not in ("", None):
            yield f"{name.replace('_', ' ')}: {cell(value)}"


def _verdict(one: Mapping[str, Any]) -> str:
    by = f" by {one['rule']}" if one["rule"] else ""
    return f"verdict: {one['stage']}, {one['action']}{by}" + (f", route {one['route']}" if one["route"] else "")


def _hit(one: Mapping[str, Any]) -> str:
    seen = ", ".join(filter(None, [one["broken"] and f"broken: {one['broken']}", *one["found"]]))
    mode = "" if one["mode"] == "enforce" else f" ({one['mode']})"
    return f"hit: {one['stage']}, {one['rule']}, {one['action']}{mode}: {seen}"


def _other(kind: str, one: Mapping[str, Any]) -> str:
    which = f"choice {one['choice']}" if kind == "sibling" else f"retry {one['retry_of'] or 0}"
    by = f" by {one['rule']}" if one["rule"] else ""
    return f"{kind}: {one['id']}, {which}, {one['action']}{by}" + (f", error {one['error']}" if one["error"] else "")


def _judgement(one: Mapping[str, Any]) -> str:
    value = "" if one["value"] is None else f" {one['value']:g}"
    chosen = f" {one['choice']} ({one['other']})" if one["choice"] else ""
    return f"feedback: {one['kind']}{value}{chosen}, {one['source']}, {cell(one['created_at'])}"


_LISTED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "calls": lambda one: f"call: {one['name']} {one['arguments']} ({one['id']})",
    "verdicts": _verdict,
    "hits": _hit,
    "siblings": lambda one: _other("sibling", one),
    "attempts": lambda one: _other("attempt", one),
    "feedback": _judgement,
}
