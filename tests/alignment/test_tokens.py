"""Which tokens are trained, and what rows that share a forward pass see of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignment.model import Model
from alignment.tokens import Row, Template, TemplateError, batch, plan, schedule, shared
from guardrails.types import Message, ToolMessage
from tests.alignment import tiny

TALK = (Message("user", "Hi"), Message("assistant", "Yes."), Message("user", "Why?"), Message("assistant", "So."))
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
THINKS = (  # as Qwen3: what was thought in earlier turns is left out, and the prompt opens what the turn begins with
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEMPLATES = {
    "chatml": (tiny.CHATML, tiny.SPECIAL, "<|im_end|>"),
    "llama3": (LLAMA3, ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"], "<|eot|>"),
    "gemma": (GEMMA, ["<start>", "<end>", "<eos>"], "<end>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]", "</s>"], "</s>"),
}


def template(name: str) -> Template:
    return Template(tiny.tokenizer(*TEMPLATES[name]))


def trained_text(words: Any, row: Row) -> str:
    text: str = words.decode([id for id, yes in zip(row.ids, row.trained, strict=True) if yes])
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_is_trained_with_the_end_of_each_turn_and_nothing_else(name: str) -> None:  # D1
    made, end = template(name), TEMPLATES[name][2]
    row = made.conversation(TALK)
    assert trained_text(made.tokenizer, row).replace(" ", "") == f"Yes.{end}So.{end}".replace(" ", "")
    ends = [
        yes for id, yes in zip(row.ids, row.trained, strict=True) if id == made.tokenizer.convert_tokens_to_ids(end)
    ]
    assert sum(ends) == 2
    assert row.ids[-1] == made.tokenizer.convert_tokens_to_ids(end) and row.trained[-1]  # D4


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_before_a_reply_are_the_prompt_that_leads_to_it(name: str) -> None:
    made = template(name)
    row = made.reply(TALK[:3], TALK[3:])
    assert row.prompt == made.prompt(TALK[:3])
    assert not any(row.trained[: len(row.prompt)]) and all(row.trained[len(row.prompt) :])


def test_a_template_that_leaves_out_earlier_thoughts_trains_the_last_turn_only() -> None:
    made = Template(tiny.tokenizer(THINKS))
    with pytest.raises(TemplateError, match="writes message 1 otherwise when others follow it; train turns = 'last'"):
        made.conversation(TALK)
    assert trained_text(made.tokenizer, made.conversation(TALK, "last")) == "So.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "talk", "said"),
    [
        ("", TALK, "no chat template"),
        (tiny.CHATML.replace("<|im_end|>", ""), TALK, "does not end a turn"),
        (tiny.CHATML, TALK[:1], "nothing in the conversation is the assistant's"),
        (
            tiny.CHATML.replace("assistant\n{% endif", "model\n{% endif"),
            TALK,
            "does not begin message 1 as it asks for it",
        ),
    ],
)
def test_nothing_to_train_is_an_error(template: str, talk: tuple[Message, ...], said: str) -> None:  # D1
    with pytest.raises(TemplateError, match=said):
        Template(tiny.tokenizer(template)).conversation(talk)


def test_padding_is_told_from_lengths_not_from_a_token() -> None:  # A1: here the pad token ends every turn, too
    model = tiny.model()
    row = model.template.conversation(TALK)
    some = batch([[row], [Row(row.ids[:5], row.trained[:5])]], pad=model.tokenizer.pad_token_id)
    assert some.real[0].all() and some.real[1].sum() == 5
    assert (some.ids[0] == model.tokenizer.pad_token_id).sum() == 4  # which count


def said(model: Model, lines: list[list[Row]], pad: int = 0) -> list[torch.Tensor]:
    """ln p of each row's trained tokens, in the order of the rows."""
    some = batch(lines, pad)
    with torch.no_grad():
        told = model.told(some, model.states(some)).logprobs
    return [told[(some.rows == i) & some.trained] for i in range(int(some.rows.max()) + 1)]


@pytest.fixture
def model() -> Model:
    return tiny.model()


@pytest.fixture
def rows(model: Model) -> list[Row]:
    texts = ["Yes.", "No, not at all, for several reasons.", "Perhaps", "I do not know what you mean."]
    return [model.template.reply(TALK[:1], [Message("assistant", text)]) for text in texts]


def test_a_row_says_the_same_alone_padded_packed_and_in_any_order(
    model: Model, rows: list[Row]
) -> None:  # A3-A5, A7, D2
    alone = [said(model, [[row]])[0] for row in rows]
    last = model.base.config.vocab_size - 1
    for lines in ([[row] for row in rows], [rows[:2], rows[2:]], [[rows[0], rows[1], rows[2]], [rows[3]]]):
        for mine, theirs in zip(said(model, lines, pad=last), alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    turned = said(model, [[row] for row in reversed(rows)])[::-1]
    for mine, theirs in zip(turned, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_two_replies_that_share_a_prompt_are_as_if_apart(model: Model, rows: list[Row]) -> None:  # D6
    both = shared(rows[0], rows[1])
    assert len(both) < len(rows[0]) + len(rows[1]) - len(rows[0].prompt) + 1
    for lines in ([[both]], [[rows[2], both], [rows[3]]]):
        some = batch(lines)
        with torch.no_grad():
            told = model.told(some, model.states(some)).logprobs
        for branch, row in ((1, rows[0]), (2, rows[1])):
            torch.testing.assert_close(told[(some.branches == branch) & some.trained], said(model, [[row]])[0])


def test_a_log_probability_belongs_to_the_token_that_was_drawn(model: Model, rows: list[Row]) -> None:  # B9
    row = rows[1]
    with torch.no_grad():
        logits = model.base(torch.tensor([row.ids])).logits[0]
    first = row.trained.index(True)
    expected = [torch.log_softmax(logits[t - 1], -1)[row.ids[t]] for t in range(first, len(row))]
    torch.testing.assert_close(said(model, [[row]])[0], torch.stack(expected))


def test_the_last_token_of_each_row_and_branch_is_found() -> None:
    plain, both = (
        Row((1, 2, 3), (False, True, True)),
        shared(Row((1, 2, 3), (False, True, True)), Row((1, 4), (False, True))),
    )
    some = batch([[plain, both], [plain]])
    assert some.last().tolist() == [[0, 2], [0, 6], [1, 2]]
    assert [some.last(branch)[1].tolist() for branch in (1, 2)] == [[0, 5], [0, 6]]


@pytest.mark.parametrize("packed", [False, True])
def test_every_row_has_one_place_and_batches_keep_to_their_budget(packed: bool) -> None:  # C15
    lengths = [(7 * i * i) % 61 + 1 for i in range(500)]
    planned = plan(lengths, 200, seed=3, packed=packed)
    assert sorted(i for lines in planned for line in lines for i in line) == list(range(500))
    assert all(len(lines) * max(sum(lengths[i] for i in line) for line in lines) <= 200 for lines in planned)
    assert planned == plan(lengths, 200, seed=3, packed=packed) != plan(lengths, 200, seed=4, packed=packed)
    tokens = sum(len(lines) * max(sum(lengths[i] for i in line) for line in lines) for lines in planned)
    assert sum(lengths) / tokens > 0.9  # little is padding


def test_a_row_longer_than_the_budget_has_a_batch_of_its_own() -> None:
    assert [[1]] in plan([10, 500, 10], 100, 0)


def test_an_epoch_has_every_row_once_in_updates_of_their_size() -> None:
    updates = schedule([5] * 70, rows=16, tokens=40, epochs=2, seed=0)
    assert [sum(len(line) for part in one for line in part) for one in updates].count(16) == 8 and len(updates) == 10
    for epoch in (updates[:5], updates[5:]):
        assert sorted(i for one in epoch for part in one for line in part for i in line) == list(range(70))


QWEN = (  # as Qwen2.5's: definitions in the system turn, calls as JSON in tags, results as the user's
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JOINS = QWEN.replace("c.function.arguments} | tojson", "'' + c.function.arguments} | tojson")
TOOL = '{"type":"function","function":{"name":"light","parameters":{"type":"object"}}}'
LIT: tuple[Message, ...] = (
    Message("user", "Lights!"), Message("assistant", "Well."), ToolMessage("assistant", '{"on": true}', "c1", "light"),
    ToolMessage("tool", "done", "c1", ""), Message("assistant", "They are on."),
)  # fmt: skip


def test_calls_of_tools_are_trained_their_definitions_and_results_are_not() -> None:
    made = Template(tiny.tokenizer(QWEN))
    row = made.conversation(LIT, tools=[TOOL])
    call = 'Well.<tool_call>{"name": "light", "arguments": {"on": true}}</tool_call><|im_end|>'
    assert trained_text(made.tokenizer, row) == call + "They are on.<|im_end|>"
    whole = made.tokenizer.decode(row.ids)
    assert '"parameters"' in whole and "<tool_response>done</tool_response>" in whole
    assert trained_text(made.tokenizer, made.reply(LIT[:1], LIT[1:3], [TOOL])) == call
    assert trained_text(made.tokenizer, made.reply(LIT[:1], LIT[1:], [TOOL])) == call + "They are on.<|im_end|>"
    assert trained_text(made.tokenizer, made.reply(LIT[:4], LIT[4:], [TOOL])) == "They are on.<|im_end|>"
    assert made.reply(LIT[:4], LIT[4:], [TOOL]).prompt == made.prompt(LIT[:4], [TOOL])


def test_a_template_that_joins_arguments_to_its_text_gets_them_as_a_text() -> None:
    made = Template(tiny.tokenizer(JOINS))
    assert '"arguments": "{\\"on\\": true}"' in made.text(LIT)


@pytest.mark.parametrize(
    ("template", "talk", "tools", "said"),
    [
        (tiny.CHATML, TALK[:2], [TOOL], "does not write the definition of the tool light"),
        (tiny.CHATML, LIT, [], "does not write the call of light in message 1"),
        (QWEN.replace("{{ m.content }}</tool", "</tool"), LIT, [], "does not write the tool's result in message 2"),
        ("{{ raise_exception('roles must alternate') }}", TALK, [], "turns it down: roles must alternate"),
    ],
)
def test_a_template_that_does_not_write_tools_says_so(
    template: str, talk: tuple[Message, ...], tools: list[str], said: str
) -> None:
    with pytest.raises(TemplateError, match=said):
        Template(tiny.tokenizer(template)).conversation(talk, tools=tools)
