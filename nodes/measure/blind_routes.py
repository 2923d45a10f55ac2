"""Routes of ComfyUI's server for blind tests; answers are what the page may see, refusals {"error": a sentence}.

GET  /snug/blind_test/round    ?round=id
POST /snug/blind_test/vote     {"round": id, "trial": from 0, "vote": 0 (cannot tell), 1 (left) or 2 (right)}
POST /snug/blind_test/finish   {"round": id}: the result of the votes so far
POST /snug/blind_test/restart  {"round": id}: forgets the votes and draws the order anew
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

from ..telemetry.process import prompt_server
from ..telemetry.requests import Refusal, answering, body_of, elsewhere, text_in, whole_number_in
from .blind_rounds import FOLDER, VOTES, NoSuchRound, Rounds

LONGEST_ID = 64
MOST_TRIALS = 200


@lru_cache(maxsize=1)
def rounds() -> Rounds:
    """Those of this ComfyUI."""
    import folder_paths

    return Rounds(Path(folder_paths.get_output_directory()) / FOLDER)


def register_routes() -> None:
    """Called while ComfyUI starts; does nothing where the pack is imported without a server."""
    server = prompt_server()
    if server is None:
        return
    server.routes.get("/snug/blind_test/round")(answering(show))
    server.routes.post("/snug/blind_test/vote")(answering(vote))
    server.routes.post("/snug/blind_test/finish")(answering(finish))
    server.routes.post("/snug/blind_test/restart")(answering(restart))


async def show(request: web.Request) -> dict[str, Any]:
    return await _done(rounds().show, text_in(request.query, "round", LONGEST_ID))


async def vote(request: web.Request) -> dict[str, Any]:
    body = await body_of(request)
    trial = whole_number_in(body, "trial", -1, 0, MOST_TRIALS)
    chosen = whole_number_in(body, "vote", -1, min(VOTES), max(VOTES))
    return await _done(rounds().vote, text_in(body, "round", LONGEST_ID), trial, chosen)


async def finish(request: web.Request) -> dict[str, Any]:
    return await _done(rounds().finish, text_in(await body_of(request), "round", LONGEST_ID))


async def restart(request: web.Request) -> dict[str, Any]:
    return await _done(rounds().restart, text_in(await body_of(request), "round", LONGEST_ID))


async def _done(action: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return await elsewhere(action, *arguments)
    except NoSuchRound as error:
        raise Refusal(str(error), 404) from None
