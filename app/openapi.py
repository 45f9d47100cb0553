"""The public routes as an OpenAPI 3.1 document, made of the models that read the requests; `GET /openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from app.embeddings import EmbeddingRequest, EmbeddingResponse
from app.moderations import ModerationRequest, ModerationResponse
from app.schemas import ChatRequest, FeedbackRequest
from app.surfaces.completions import CompletionRequest
from app.surfaces.messages import MessageRequest
from app.surfaces.responses import ResponseRequest

router = APIRouter()
JSON, EVENTS = "application/json", "text/event-stream"
Json = dict[str, Any]


class ErrorInfo(BaseModel):
    """What is wrong, where, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error body."""

    error: ErrorInfo


class MessagesErrorInfo(BaseModel):
    """What is wrong, in Anthropic's words; the code is ours."""

    type: str
    message: str
    code: str


class MessagesError(BaseModel):
    """Anthropic's error body."""

    type: str
    error: MessagesErrorInfo


BODIES: Mapping[str, tuple[type[BaseModel], tuple[str, ...]]] = {
    "/v1/chat/completions": (ChatRequest, ("id", "object", "created", "model", "choices", "usage", "guardrails")),
    "/v1/completions": (CompletionRequest, ("id", "object", "created", "model", "choices", "usage", "guardrails")),
    "/v1/responses": (ResponseRequest, ("id", "object", "created_at", "status", "model", "output", "guardrails")),
    "/v1/messages": (MessageRequest, ("id", "type", "role", "model", "content", "stop_reason", "usage", "guardrails")),
    "/v1/moderations": (ModerationRequest, ()),
    "/v1/embeddings": (EmbeddingRequest, ()),
    "/v1/feedback": (FeedbackRequest, ("object", "target", "recorded")),
}
"""What is sent to each route, and the keys that every answer has where no model describes it."""
ANSWERS: Mapping[str, type[BaseModel]] = {
    "/v1/moderations": ModerationResponse,
    "/v1/embeddings": EmbeddingResponse,
}
SAYS: Mapping[str, str] = {
    "/v1/chat/completions": "A reply, whole or streamed, after the guards.",
    "/v1/completions": "A reply in OpenAI's older API.",
    "/v1/responses": "A reply in OpenAI's newer API.",
    "/v1/messages": "A reply in Anthropic's API.",
    "/v1/moderations": "What the policy finds in a text.",
    "/v1/embeddings": "Vectors of texts, where the engine has them.",
    "/v1/feedback": "Records what a person thought of a reply.",
    "/v1/models": "The models that are served.",
    "/v1/models/{model}": "One model.",
    "/v1/tickets/{ticket_id}": "Where a ticket stands, and the person's answer.",
    "/livez": "Whether the process serves.",
    "/readyz": "Whether a turn can be answered.",
}
STREAMING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@router.get("/openapi.json", include_in_schema=False)
async def openapi() -> Response:
    """The document; it needs no key, and tells nothing of this installation."""
    return Response(_rendered(), media_type=JSON)


@cache
def _rendered() -> bytes:
    return orjson.dumps(document())


def document() -> Json:
    """The public routes with what is sent to them and comes of it."""
    models: list[type[BaseModel]] = [Error, MessagesError, *(one for one, _ in BODIES.values()), *ANSWERS.values()]
    _, told = models_json_schema([(one, "validation") for one in models], ref_template="#/components/schemas/{model}")
    paths = {path: {"post": _post(path)} for path in BODIES}
    paths |= {path: {"get": _get(path)} for path in SAYS if path not in BODIES}
    return {
        "openapi": "3.1.0",
        "info": {"title": "newel", "version": _version(), "description": "Guarded chat; docs/api.md says the rest."},
        "paths": paths,
        "components": {
            "schemas": told["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"x-api-key": []}],
    }


def _version() -> str:
    try:
        return version("newel")
    except PackageNotFoundError:
        return "0"


def _post(path: str) -> Json:
    model, keys = BODIES[path]
    answered = ANSWERS.get(path)
    schema = _of(answered) if answered else {"type": "object", "required": list(keys)}
    content: Json = {JSON: {"schema": schema}}
    content |= {EVENTS: {"schema": {"description": "Server-sent events."}}} if path in STREAMING else {}
    body = {"required": True, "content": {JSON: {"schema": _of(model)}}}
    return _operation(path, {"200": {"description": "The answer.", "content": content}}) | {"requestBody": body}


def _get(path: str) -> Json:
    answer = {"description": "The answer.", "content": {JSON: {"schema": {"type": "object"}}}}
    name = path.partition("{")[2].rstrip("}")
    place = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    told = _operation(path, {"200": answer}) | ({"parameters": [place]} if name else {})
    if path.startswith("/v1/"):
        return told
    not_ready = {"503": answer | {"description": "What is missing."}} if path == "/readyz" else {}
    return told | {"security": [], "responses": {"200": answer, **not_ready}}


def _operation(path: str, responses: Json) -> Json:
    error = MessagesError if path == "/v1/messages" else Error
    wrong = {"description": "What is wrong, and what to do.", "content": {JSON: {"schema": _of(error)}}}
    return {"summary": SAYS[path], "operationId": path.strip("/"), "responses": responses | {"default": wrong}}


def _of(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
