"""Conversations as tokens: which of them are trained, and how many rows share a forward pass.

Which tokens the assistant wrote is found by rendering the conversation up to each of its turns, so that it works with
any chat template. Padding is told from lengths, never from a pad token: in many tokenizers that is the token which ends
a turn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor

from alignment.records import written
from guardrails.types import Message

Turns = Literal["all", "last"]


class TemplateError(ValueError):
    """A chat template, or a conversation in it, from which no trainable tokens can be told; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence. trained: true on the tokens that the model is to say, of which the first has one before it.

    branches: of each token, None where all are one text: tokens of branch 0 are seen by all that come after them, those
    of another only by their own, and each branch goes on from the end of branch 0. weight: of its loss.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    branches: tuple[int, ...] | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first trained one."""
        return self.ids[: self.trained.index(True)] if any(self.trained) else self.ids


class Template:
    """The chat template of a tokenizer. end: ids of the tokens that end a turn of the assistant's."""

    def __init__(self, tokenizer: Any, end: Sequence[int] = ()):
        """Raises TemplateError where the tokenizer has no template, or is a slow one."""
        if not tokenizer.chat_template:
            raise TemplateError("the tokenizer has no chat template; copy one into its folder as chat_template.jinja")
        if not tokenizer.is_fast:
            raise TemplateError("the tokenizer is not a fast one, which knows where in a text a token comes from")
        self.tokenizer = tokenizer
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.end = frozenset(end) or frozenset(special | {tokenizer.eos_token_id} - {None})

    def text(self, messages: Sequence[Message], ask: bool = False, tools: Sequence[str] = ()) -> str:
        """The conversation as the model reads it; with `ask` up to where the assistant's next turn begins.

        tools: JSON schemas, each as a text. Raises TemplateError where the template turns the conversation down.
        """
        return self._rendered(written(messages), ask, tools)

    def _rendered(self, told: Sequence[dict[str, Any]], ask: bool, tools: Sequence[str]) -> str:
        schemas = [json.loads(one) for one in tools] or None
        try:
            try:
                return self._applied(told, ask, schemas)
            except TypeError:  # a template that joins arguments to its text, as they come from an engine
                return self._applied([_as_text(one) for one in told], ask, schemas)
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateError(f"the chat template turns it down: {error}") from None

    def _applied(self, told: Sequence[dict[str, Any]], ask: bool, schemas: list[Any] | None) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            list(told), tokenize=False, add_generation_prompt=ask, tools=schemas
        )
        return rendered

    def prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[int, ...]:
        """The tokens of a conversation that the assistant is to answer; raises TemplateError."""
        told = written(messages)
        text = self._rendered(told, True, tools)
        self._check_tools(told, text, tools)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def conversation(
        self, messages: Sequence[Message], turns: Turns = "all", tools: Sequence[str] = (), after: int = 0
    ) -> Row:
        """A conversation of which the assistant's turns, with the tokens that end them, are trained.

        Calls of tools are a part of the turn that makes them; their results, and the definitions in `tools`, are not
        trained. after: so many messages at the beginning are not, either. Raises TemplateError: for a template in which
        a turn reads otherwise once others follow (train `last` then), that does not end turns or does not write what
        there is of tools, and where nothing is trained.
        """
        told = written(messages)
        whole, first = self._rendered(told, False, tools), len(written(messages[:after]))
        self._check_tools(told, whole, tools)
        said = [i for i, one in enumerate(told) if one["role"] == "assistant" and i >= first]
        spans = [self._span(told, i, whole, tools) for i in (said[-1:] if turns == "last" else said)]
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = tuple(encoded["input_ids"]), encoded["offset_mapping"]
        trained = [False] * len(ids)
        for start, end in spans:
            places = [i for i, (a, b) in enumerate(offsets) if b > start and a < end and b > a]
            last = next((i for i in reversed(places) if ids[i] in self.end), None)
            if last is None:
                raise TemplateError("the template does not end a turn of the assistant's with a special token")
            for i in range(places[0], last + 1):
                trained[i] = True
        if not any(trained):
            raise TemplateError("nothing in the conversation is the assistant's: there is nothing to learn from it")
        end = len(ids) - trained[::-1].index(True)  # what the template writes after the last turn teaches nothing
        return Row(ids[:end], tuple(trained[:end]))

    def _span(self, told: Sequence[dict[str, Any]], i: int, whole: str, tools: Sequence[str]) -> tuple[int, int]:
        """Where in the whole text what the assistant said in message `i` stands, with the end of its turn."""
        before, upto = self._rendered(told[:i], True, tools), self._rendered(told[: i + 1], False, tools)
        if not whole.startswith(upto.rstrip()):
            raise TemplateError(
                f"the template writes message {i} otherwise when others follow it; train turns = 'last'"
            )
        if not upto.startswith(before):
            raise TemplateError(f"the template does not begin message {i} as it asks for it, so no prompt leads to it")
        names = [one["function"]["name"] for one in told[i].get("tool_calls", ())]
        if lacking := [name for name in names if name not in upto[len(before) :]]:
            raise TemplateError(f"the template does not write the call of {lacking[0]} in message {i}: {_TOOLLESS}")
        return len(before), len(upto)

    def _check_tools(self, told: Sequence[dict[str, Any]], whole: str, tools: Sequence[str]) -> None:
        """Raises TemplateError where the template leaves out definitions of tools, calls or results."""
        names = [json.loads(one)["function"]["name"] for one in tools]
        if lacking := [name for name in names if name not in whole]:
            raise TemplateError(f"the template does not write the definition of the tool {lacking[0]}: {_TOOLLESS}")
        for i, one in enumerate(told):
            calls = [call["function"]["name"] for call in one.get("tool_calls", ())]
            if lacking := [name for name in calls if name not in whole]:
                raise TemplateError(f"the template does not write the call of {lacking[0]} in message {i}: {_TOOLLESS}")
            if one["role"] == "tool" and one["content"]:
                without = [*told[:i], one | {"content": ""}, *told[i + 1 :]]
                if self._rendered(without, False, tools) == self._rendered(told, False, tools):
                    raise TemplateError(f"the template does not write the tool's result in message {i}: {_TOOLLESS}")

    def reply(self, prompt: Sequence[Message], said: Sequence[Message], tools: Sequence[str] = ()) -> Row:
        """A prompt, of which nothing is trained, and the assistant's reply to it; raises TemplateError.

        Of a reply with calls of tools and their results, all of the assistant's turns are trained.
        """
        several = any(one.role != "assistant" for one in said)
        return self.conversation([*prompt, *said], "all" if several else "last", tools, len(prompt) if several else 0)


_TOOLLESS = "take a model whose chat template knows tools, or leave such rows out"


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as a text."""
    calls = [
        one | {"function": one["function"] | {"arguments": _json(one["function"]["arguments"])}}
        for one in message.get("tool_calls", ())
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def shared(chosen: Row, rejected: Row) -> Row:
    """Both replies to one prompt as one row: the prompt as branch 0, then each reply, which does not see the other."""
    a, b = chosen.ids, rejected.ids
    limit = min(len(chosen.prompt), len(rejected.prompt))
    common = next((i for i in range(limit) if a[i] != b[i]), limit)
    return Row(
        a + b[common:],
        chosen.trained + rejected.trained[common:],
        (0,) * common + (1,) * (len(a) - common) + (2,) * (len(b) - common),
    )


# --- rows that share a forward pass


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side and behind each other. All are [B, T]; `allowed` is [B, 1, T, T] bool, None for plain causal.

    before: the column of the token that each one follows, its own for the first of a row. rows: of each token the
    number of its row among those given, -1 for padding. branches: as in Row.
    """

    ids: Tensor
    positions: Tensor
    before: Tensor
    trained: Tensor
    rows: Tensor
    branches: Tensor
    allowed: Tensor | None = field(repr=False)

    @property
    def real(self) -> Tensor:
        """True where there is a token."""
        return self.rows >= 0

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        tensors = (self.ids, self.positions, self.before, self.trained, self.rows, self.branches)
        allowed = self.allowed.to(device) if self.allowed is not None else None
        ids, positions, before, trained, rows, branches = (one.to(device) for one in tensors)
        return Batch(ids, positions, before, trained, rows, branches, allowed)

    def last(self, branch: int = 0) -> Tensor:
        """[rows, 2]: (line, column) of the last token of each row, of this branch (0: of any)."""
        wanted = self.real if not branch else self.real & (self.branches == branch)
        count = int(self.rows.max()) + 1
        places = torch.zeros(count, 2, dtype=torch.long, device=self.rows.device)
        line, column = wanted.nonzero(as_tuple=True)
        places[self.rows[line, column]] = torch.stack([line, column], -1)  # in order: the last one stays
        return places


def batch(lines: Sequence[Sequence[Row]], pad: int = 0) -> Batch:
    """Some rows behind each other in each line, lines padded on the right to the longest.

    `pad` may be any token of the vocabulary: nothing sees it, and it counts nowhere.
    """
    longest = max(sum(map(len, line)) for line in lines)
    shape = (len(lines), longest)
    ids, rows = torch.full(shape, pad), torch.full(shape, -1)
    positions, before, branches = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    trained = torch.zeros(shape, dtype=torch.bool)
    number = 0
    for i, line in enumerate(lines):
        at = 0
        for row in line:
            some = slice(at, at + len(row))
            ids[i, some], trained[i, some] = torch.tensor(row.ids), torch.tensor(row.trained)
            branches[i, some], rows[i, some] = torch.tensor(row.branches or 0), number
            positions[i, some], before[i, some] = _positions(row), _before(row) + at
            at, number = at + len(row), number + 1
    plain = all(len(line) == 1 and line[0].branches is None for line in lines)
    return Batch(ids, positions, before, trained, rows, branches, None if plain else _allowed(rows, branches))


def _positions(row: Row) -> Tensor:
    if row.branches is None:
        return torch.arange(len(row))
    trunk = row.branches.count(0)
    parts = [torch.arange(trunk)]
    parts += [trunk + torch.arange(row.branches.count(branch)) for branch in sorted(set(row.branches) - {0})]
    return torch.cat(parts)


def _before(row: Row) -> Tensor:
    """The place in the row of the token before each: of the first one of a branch that is the last of the trunk."""
    places = torch.arange(len(row)) - 1
    if row.branches is not None:
        trunk = row.branches.count(0)
        for branch in set(row.branches) - {0}:
            places[row.branches.index(branch)] = trunk - 1
    return places.clamp(min=0)


def _allowed(rows: Tensor, branches: Tensor) -> Tensor:
    """Token i sees j: of the same row, not later, and of the trunk or of the same branch. Padding sees itself alone,
    lest its softmax be over nothing."""
    seen, sees = rows[:, None, :], rows[:, :, None]
    same = (seen == sees) & (sees >= 0)
    visible = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    length = rows.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (same & visible & causal | torch.eye(length, dtype=torch.bool))[:, None]


def plan(lengths: Sequence[int], budget: int, seed: int, packed: bool = False, pool: int = 50) -> list[list[list[int]]]:
    """How rows of these lengths go into batches: of each batch its lines, of each line the numbers of its rows.

    Each row is in one place. A batch takes at most `budget` tokens with its padding, or one row. Rows of like length
    are put together, within pools of `pool` batches at random, and the batches come in random order: same seed, same
    plan.
    packed: lines hold several rows, as many as fit beside each other in the longest.
    """
    order = random.Random(f"{seed}:rows")
    numbers = list(range(len(lengths)))
    order.shuffle(numbers)
    typical = max(1, budget // max(1, sum(lengths) // max(1, len(lengths))))
    batches: list[list[list[int]]] = []
    for at in range(0, len(numbers), pool * typical):
        some = sorted(numbers[at : at + pool * typical], key=lambda i: -lengths[i])
        batches += list(_filled(_lines(some, lengths, budget) if packed else [[i] for i in some], lengths, budget))
    order.shuffle(batches)
    return batches


def schedule(
    lengths: Sequence[int], rows: int, tokens: int, epochs: int, seed: int, packed: bool = False
) -> list[list[list[list[int]]]]:
    """The updates of a training: of each, its parts (a forward pass each), as `plan` gives them.

    An update has `rows` rows, the last one of an epoch perhaps fewer; each row is in one update of every epoch. Rows of
    like length come together, so that little is padding.
    """
    updates = []
    for epoch in range(epochs):
        order = random.Random(f"{seed}:{epoch}")
        numbers = list(range(len(lengths)))
        order.shuffle(numbers)
        pools = [
            sorted(numbers[at : at + 50 * rows], key=lambda i: lengths[i]) for at in range(0, len(numbers), 50 * rows)
        ]
        chunks = [pool[at : at + rows] for pool in pools for at in range(0, len(pool), rows)]
        order.shuffle(chunks)
        for chunk in chunks:
            parts = plan([lengths[i] for i in chunk], tokens, seed, packed)
            updates.append([[[chunk[k] for k in line] for line in lines] for lines in parts])
    return updates


def _lines(numbers: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: rows into lines as long as the longest row, at most `budget`."""
    longest = lengths[numbers[0]] if numbers else 0
    lines: list[list[int]] = []
    room: list[int] = []
    for i in numbers:
        place = next((k for k, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            lines.append([i])
            room.append(min(longest, max(budget, lengths[i])) - lengths[i])
        else:
            lines[place].append(i)
            room[place] -= lengths[i]
    return lines


def _filled(lines: Sequence[list[int]], lengths: Sequence[int], budget: int) -> Iterator[list[list[int]]]:
    """Lines, the longest first, into batches of at most `budget` tokens."""
    some: list[list[int]] = []
    longest = 0
    for line in lines:
        size = sum(lengths[i] for i in line)
        if some and max(longest, size) * (len(some) + 1) > budget:
            yield some
            some, longest = [], 0
        some, longest = [*some, line], max(longest, size)
    if some:
        yield some
