"""Routes of ComfyUI's server that lease, show and save samples; answers are JSON, refusals {"error": a sentence}.

POST /snug/telemetry/lease        {"client_id": text, "seconds": 0 to 60, "push": true or false}
GET  /snug/telemetry/snapshot     a sample of now
GET  /snug/telemetry/history      ?since=number: samples and events after it, the counters, and the prompts;
                                  &ended_after=seconds since the epoch: only prompts that ended later
GET  /snug/telemetry/diagnostics  versions, devices, backends, start options, the last minute
POST /snug/telemetry/export       {"format": "csv" or "json", "prompt_id": text}: writes a file, {"path"}

Clients that asked for it are sent each sample with the events since the one before, as message EVENT of `sending`.
Samples and events share their numbers.
"""

from __future__ import annotations

import re
from typing import Any

from aiohttp import web

from ...quant_backends.core.errors import SnugError
from . import inspection_routes, page_files
from .diagnostics import diagnostics
from .monitor import save
from .process import prompt_server, telemetry
from .record import PromptRecord
from .report import as_csv, as_json, event_data, record_data, sample_data
from .requests import Refusal, answering, body_of, choice_in, elsewhere, number_in, text_in

LONGEST_LEASE = 60.0
LONGEST_ID = 128
CSV, JSON = "csv", "json"
EXPORTS = "snug/memory"


def register_routes() -> None:
    """Called while ComfyUI starts; does nothing where the pack is imported without a server."""
    server = prompt_server()
    if server is None:
        return
    routes = server.routes
    routes.post("/snug/telemetry/lease")(answering(lease))
    routes.get("/snug/telemetry/snapshot")(answering(snapshot))
    routes.get("/snug/telemetry/history")(answering(history))
    routes.get("/snug/telemetry/diagnostics")(answering(show_diagnostics))
    routes.post("/snug/telemetry/export")(answering(export))
    inspection_routes.register(routes)
    page_files.register(server.app)
    server.add_on_prompt_handler(_prompt_queued)


def _prompt_queued(prompt: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI calls this for each prompt that clients send, and goes on with what is returned."""
    telemetry().prompt_queued()
    return prompt


async def lease(request: web.Request) -> dict[str, Any]:
    body = await body_of(request)
    client_id = text_in(body, "client_id", LONGEST_ID)
    seconds = float(number_in(body, "seconds", 10, 0, LONGEST_LEASE))
    push = body.get("push", False)
    if not isinstance(push, bool):
        raise Refusal("push must be true or false.")
    if push and client_id not in prompt_server().sockets:
        raise Refusal("No client with this client_id is connected, so nothing can be pushed to it.")
    if seconds == 0:
        telemetry().leases.end(client_id)
    else:
        try:
            telemetry().lease(client_id, seconds, push)
        except ValueError as error:
            raise Refusal(str(error)) from None
    return {"client_id": client_id, "seconds": seconds, "push": push}


async def snapshot(request: web.Request) -> dict[str, Any]:
    return {**sample_data(await elsewhere(telemetry().take)), "is_sampling": telemetry().is_sampling}


async def history(request: web.Request) -> dict[str, Any]:
    since = request.query.get("since", "0")
    if not (since.isascii() and since.isdigit() and len(since) <= 18):
        raise Refusal(f"since is {since[:40]!r}; it must be a number of a sample.")
    ended_after = request.query.get("ended_after", "0")
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", ended_after):
        raise Refusal(f"ended_after is {ended_after[:40]!r}; it must be a time in seconds since the epoch.")
    return await elsewhere(_history, int(since), float(ended_after))


def _history(since: int, ended_after: float) -> dict[str, Any]:
    known = telemetry()
    running = known.running_record()
    return {
        "samples": [
            {"number": number, **sample_data(sample)} for number, sample in known.history.since(since)
        ],
        "events": [
            {"number": number, **event_data(event)} for number, event in known.events.ring.since(since)
        ],
        "counters": known.events.counters(),
        "prompts": [
            record_data(record) for record in list(known.prompts) if (record.ended or 0) > ended_after
        ],
        "running": None if running is None else record_data(running),
    }


async def show_diagnostics(request: web.Request) -> dict[str, Any]:
    return await elsewhere(diagnostics)


async def export(request: web.Request) -> dict[str, Any]:
    body = await body_of(request)
    kind = choice_in(body, "format", (CSV, JSON))
    prompt_id = text_in(body, "prompt_id", LONGEST_ID)
    record = telemetry().record_of(prompt_id)
    if record is None:
        raise Refusal("No prompt with this prompt_id is recorded; only the last few are kept.", 404)
    try:
        return {"path": await elsewhere(_export, record, kind)}
    except SnugError as error:  # the disk is full, for one
        raise Refusal(str(error), 507) from None


def _export(record: PromptRecord, kind: str) -> str:
    known = telemetry()
    if kind == CSV:
        text = as_csv(record, from_start=True)
    else:
        text = as_json(record, known.take(), known.events_of(record), from_start=True)
    return save(EXPORTS, f".{kind}", text)
