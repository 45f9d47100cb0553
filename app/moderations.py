"""POST /v1/moderations: what the tenant's policy finds in a text, in OpenAI's categories and a few of our own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from app.api import caller, service_of
from app.middleware import read_body
from app.reading import Reader, reader
from app.records import new_id
from app.schemas import Body, parse
from guardrails.types import Finding, Policy, Verdict
from guardrails.validators import injection, personal, secrets

router = APIRouter()
STANDARD = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""OpenAI's categories: SDKs want all of them."""
OURS = ("prompt_injection", "secrets", "personal_data", "policy")
"""Categories of ours; `policy` is whether the policy would not let the text pass, for whatever reason."""
_HAZARDS: Mapping[str, tuple[str, ...]] = {
    # MLCommons' hazards: the head for harm, Llama Guard
    "violent_crimes": ("violence",),
    "nonviolent_crimes": ("illicit",),
    "sex_crimes": ("illicit", "illicit/violent"),
    "child_exploitation": ("sexual", "sexual/minors"),
    "indiscriminate_weapons": ("illicit", "illicit/violent"),
    "self_harm": ("self-harm",),
    "hate": ("hate",),
    "sexual_content": ("sexual",),
    "privacy": ("personal_data",),
    # Qwen3Guard
    "violence": ("violence",),
    "illegal_acts": ("illicit",),
    "personal_data": ("personal_data",),
    "jailbreak": ("prompt_injection",),
    # ShieldGemma
    "dangerous": ("illicit",),
    "harassment": ("harassment",),
    # the trained head for injections
    "injection": ("prompt_injection",),
}
_KINDS = {
    **dict.fromkeys(secrets.KINDS, ("secrets",)),
    **dict.fromkeys(personal.KINDS, ("personal_data",)),
    **dict.fromkeys(get_args(injection.Family), ("prompt_injection",)),
}
LABELS: Mapping[str, tuple[str, ...]] = {
    **{name.replace("/", "_").replace("-", "_"): (name.partition("/")[0], name) for name in STANDARD},
    **_KINDS,
    **_HAZARDS,
}
"""The categories of a finding by its label; a rule of one's own may call what it finds `self_harm_intent`, say."""


class TextPart(Body):
    """A part of a text."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class ModerationRequest(Body):
    """The body of POST /v1/moderations: a text, some texts, or one text in parts. The `model` is not read."""

    input: str | list[str] | list[TextPart] = Field(min_length=1)
    model: str | None = None


class ModerationResult(BaseModel):
    """What was found in one text; keys of `categories` and scores are OpenAI's 13, and ours."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    guardrails: dict[str, Any]


class ModerationResponse(BaseModel):
    """The answer of POST /v1/moderations."""

    id: str
    model: str
    results: list[ModerationResult]


@router.post("/v1/moderations")
async def moderations(request: Request) -> Response:
    """What the policy's input rules find in each text; nothing is recorded, and it counts as one request."""
    service = service_of(request)
    key, tenant = await caller(request)
    asked = parse(ModerationRequest, await read_body(request, service.settings.body_limit))
    async with service.traffic.counted(key, texts(asked)) as counted:
        read = await reader(service, tenant)
        results = [await _result(read, text) for text in texts(asked)]
    told = {"id": new_id("modr-"), "model": read.policy.id, "results": results}
    return JSONResponse(told, headers=dict(counted.headers))


def texts(asked: ModerationRequest) -> list[str]:
    """The texts that were sent: parts are one text."""
    if isinstance(asked.input, str):
        return [asked.input]
    parts = [one.text for one in asked.input if isinstance(one, TextPart)]
    return ["\n\n".join(parts)] if parts else [one for one in asked.input if isinstance(one, str)]


async def _result(read: Reader, text: str) -> dict[str, Any]:
    return result(read.policy, await read.verdict(text))


def result(policy: Policy, verdict: Verdict) -> dict[str, Any]:
    """A verdict in categories. `flagged`: the policy would stop the text, or finds what OpenAI has a category for.

    Scores are those of findings that made a rule fire, else 0; rules in shadow do not count.
    """
    findings = [one for hit in verdict.hits if hit.mode == "enforce" for one in hit.findings]
    scores = _scores(findings) | {"policy": 1.0 if verdict.action.stops else 0.0}
    found = {name: score > 0 for name, score in scores.items()}
    return {
        "flagged": verdict.action.stops or any(found[name] for name in STANDARD),
        "categories": found,
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] if found[name] else [] for name in STANDARD},
        "guardrails": {"action": verdict.action.word, "policy": policy.id},
    }


def _scores(findings: Iterable[Finding]) -> dict[str, float]:
    scores = dict.fromkeys((*STANDARD, *OURS), 0.0)
    for one in findings:
        for name in LABELS.get(one.label, ()):
            scores[name] = max(scores[name], round(one.score, 4))
    return scores
