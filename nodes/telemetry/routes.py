"""ComfyUI's web server: routes that lease and show samples, and sending samples to those who asked for them.

POST /snug/telemetry/lease     {"client_id": text, "seconds": 0 to 60, "push": true or false}
GET  /snug/telemetry/snapshot  a sample of now
GET  /snug/telemetry/history   ?since=number: samples after it, and the prompts
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from aiohttp import web

from .accounting import Sample
from .report import record_data, sample_data
from .service import Telemetry

# Type of the messages.
EVENT = "snug.telemetry"
LONGEST_LEASE = 60.0
LONGEST_BODY = 4096
LONGEST_ID = 128


@lru_cache
def telemetry() -> Telemetry:
    """The one of this process."""
    return Telemetry(_is_running, _send)


def register_routes() -> None:
    """Called while ComfyUI starts; does nothing where the pack is imported without a server."""
    server = _server()
    if server is not None:
        server.routes.post("/snug/telemetry/lease")(lease)
        server.routes.get("/snug/telemetry/snapshot")(snapshot)
        server.routes.get("/snug/telemetry/history")(history)


def _server() -> Any:
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


def _is_running(prompt_id: str) -> bool:
    running, _ = _server().prompt_queue.get_current_queue_volatile()
    return any(item[1] == prompt_id for item in running)


def _send(number: int, sample: Sample, client_ids: list[str]) -> None:
    """A client that is gone is forgotten."""
    server = _server()
    data = {"number": number, **sample_data(sample)}
    for client_id in client_ids:
        if client_id in server.sockets:
            server.send_sync(EVENT, data, client_id)
        else:
            telemetry().leases.end(client_id)


# ---- routes ---------------------------------------------------------------------------------------------------------


async def lease(request: web.Request) -> web.Response:
    try:
        client_id, seconds, push = _lease_of(await _body(request))
        if seconds == 0:
            telemetry().leases.end(client_id)
        else:
            telemetry().lease(client_id, seconds, push)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response({"client_id": client_id, "seconds": seconds, "push": push})


async def snapshot(request: web.Request) -> web.Response:
    # Asking a driver may take milliseconds, which the server must not wait.
    sample = await asyncio.get_running_loop().run_in_executor(None, telemetry().take)
    return web.json_response({**sample_data(sample), "is_sampling": telemetry().is_sampling})


async def history(request: web.Request) -> web.Response:
    since = request.query.get("since", "0")
    if not (since.isascii() and since.isdigit() and len(since) <= 18):
        return web.json_response(
            {"error": f"since is {since[:40]!r}; it must be a number of a sample."}, status=400
        )
    return web.json_response(await asyncio.get_running_loop().run_in_executor(None, _history, int(since)))


def _history(since: int) -> Mapping[str, Any]:
    known = telemetry()
    running = known.running_record()
    return {
        "samples": [
            {"number": number, **sample_data(sample)} for number, sample in known.history.since(since)
        ],
        "prompts": [record_data(record) for record in list(known.prompts)],
        "running": None if running is None else record_data(running),
    }


async def _body(request: web.Request) -> Any:
    text = await request.content.read(LONGEST_BODY + 1)
    if len(text) > LONGEST_BODY:
        raise ValueError(f"The request is longer than {LONGEST_BODY} bytes.")
    try:
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError("The request is not JSON.") from None


def _lease_of(body: Any) -> tuple[str, float, bool]:
    if not isinstance(body, dict):
        raise ValueError("The request must be a JSON object with client_id, seconds and push.")
    client_id, seconds, push = body.get("client_id"), body.get("seconds", 10), body.get("push", False)
    if not isinstance(client_id, str) or not 0 < len(client_id) <= LONGEST_ID:
        raise ValueError(f"client_id must be a text of 1 to {LONGEST_ID} characters.")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_LEASE:
        raise ValueError(f"seconds must be a number from 0 to {LONGEST_LEASE:.0f}.")
    if not isinstance(push, bool):
        raise ValueError("push must be true or false.")
    if push and client_id not in _server().sockets:
        raise ValueError("No client with this client_id is connected, so nothing can be pushed to it.")
    return client_id, float(seconds), push
