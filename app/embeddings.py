"""POST /v1/embeddings: passed to an engine that has it, with texts as the tenant's policy lets them be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.api import caller, service_of
from app.errors import ApiError, unavailable
from app.frames import BackendError
from app.middleware import read_body
from app.reading import Reader, reader
from app.schemas import Body, parse

router = APIRouter()
MAX_TEXTS = 2048
NOT_SERVED = "embeddings_not_served"
"""The code of an engine's refusal that has no such route."""


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings; lists of tokens are not served, since no rule can read them."""

    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=65_536)
    user: str | None = None


class Embedding(BaseModel):
    """The vector of one text: numbers, or base64 of 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """The answer of POST /v1/embeddings, as the engine writes it."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: dict[str, Any]


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """The engine's answer, byte by byte; nothing is recorded."""
    service = service_of(request)
    key, tenant = await caller(request)
    asked = parse(EmbeddingRequest, await read_body(request, service.settings.body_limit))
    release = service.fleet.choose(asked.model)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if len(texts) > MAX_TEXTS:
        raise ApiError(400, f"At most {MAX_TEXTS} texts are allowed.", code="invalid_value", param="input")
    async with service.traffic.counted(key, texts, release) as counted:
        told = await _told(await reader(service, tenant), asked, texts)
        service.fleet.require(release)
        try:
            async with service.fleet.slot(release, tenant=tenant.name):
                answer = await service.fleet.post("embeddings", told, release)
        except BackendError as error:
            raise _refused(error, asked.model) from None
        counted.tokens = _used(answer)
    return Response(answer, media_type="application/json", headers=dict(counted.headers))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


def _used(answer: bytes) -> int:
    """The tokens that an engine has counted; the vectors are not read."""
    try:
        usage = msgspec.json.decode(answer, type=_Answer).usage
    except msgspec.DecodeError:
        return 0
    return usage.prompt_tokens if usage else 0


async def _told(read: Reader, asked: EmbeddingRequest, texts: Sequence[str]) -> dict[str, Any]:
    """What the engine is asked: each text judged, and redacted where a rule says so; raises ApiError 400."""
    said = [await _allowed(read, text, place) for place, text in enumerate(texts)]
    same = asked.model_dump(include={"encoding_format", "dimensions"}, exclude_none=True)
    return same | {"input": said[0] if isinstance(asked.input, str) else said}


async def _allowed(read: Reader, text: str, place: int) -> str:
    verdict = await read.verdict(text)
    if verdict.action.stops:
        raise ApiError(400, verdict.text, code="content_filter", param=f"input[{place}]")
    return verdict.text


def _refused(error: BackendError, model: str) -> ApiError:
    """What the client is told of an engine's failure."""
    if error.code == NOT_SERVED:
        message = f"The model '{model}' makes no embeddings: its engine has no such route."
        return ApiError(404, message, code=NOT_SERVED, param="model")
    if error.fault == "rejected":
        return ApiError(400, error.message, code=error.code or "invalid_value", param="input")
    if error.fault == "timeout":
        return ApiError(504, error.message, code="engine_timeout", kind="server_error", retry_after=5)
    return unavailable(error.message, f"engine_{error.fault}", error.retry_after or 5)
