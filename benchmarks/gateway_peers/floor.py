"""The floor: what a proxy in Python costs that does nothing but pass bytes on. `python floor.py PORT UPSTREAM`."""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
import uvicorn

SESSION: list[aiohttp.ClientSession] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    """A raw ASGI application with an aiohttp client."""
    if not SESSION:
        connector = aiohttp.TCPConnector(limit=0)
        SESSION.append(aiohttp.ClientSession(connector=connector, auto_decompress=False))
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    headers = {"content-type": "application/json"}
    async with SESSION[0].post(sys.argv[2] + scope["path"], data=body, headers=headers) as answer:
        kind = answer.headers["content-type"].encode()
        start = {"type": "http.response.start", "status": answer.status, "headers": [(b"content-type", kind)]}
        if kind != b"text/event-stream":
            whole = await answer.read()
            start["headers"].append((b"content-length", b"%d" % len(whole)))
            await send(start)
            return await send({"type": "http.response.body", "body": whole})
        await send(start)
        async for piece in answer.content.iter_any():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False, lifespan="off", ws="none"
    )
