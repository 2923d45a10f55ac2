"""What the routes have in common: bodies of JSON that are checked, answers that say what is wrong, work elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

from ...quant_backends.core.errors import SnugError

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LONGEST_BODY = 4096
LONGEST_NAME = 1024


class Refusal(Exception):
    """A request that cannot be answered, in a sentence for people; status: of HTTP."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


def answering(handler: Callable[[web.Request], Awaitable[Mapping[str, Any]]]) -> Handler:
    """Sends what the handler returns as JSON; a Refusal, and what a SnugError says, as {"error": sentence}."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return web.json_response(await handler(request))
        except Refusal as refusal:
            return web.json_response({"error": str(refusal)}, status=refusal.status)
        except SnugError as error:
            return web.json_response({"error": str(error)}, status=422)

    return answer


async def elsewhere(function: Callable[..., T], *arguments: Any) -> T:
    """Runs it on another thread: the server must not wait for disks and drivers."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def body_of(request: web.Request, longest: int = LONGEST_BODY) -> dict[str, Any]:
    """The JSON object that a request brings. Raises Refusal for anything else, or when it is longer."""
    text = bytearray()
    async for piece in request.content.iter_chunked(longest + 1):
        text += piece
        if len(text) > longest:
            raise Refusal(f"The request is longer than {longest} bytes.", 413)
    try:
        body = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise Refusal("The request is not JSON.") from None
    if not isinstance(body, dict):
        raise Refusal("The request must be a JSON object.")
    return body


def text_in(body: Mapping[str, Any], key: str, longest: int = LONGEST_NAME) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise Refusal(f"{key} must be a text of 1 to {longest} characters.")
    return value


def number_in(body: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Refusal(f"{key} must be a number from {least:g} to {most:g}.")
    return value


def whole_number_in(body: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refusal(f"{key} must be a whole number from {least} to {most}.")
    return value


def choice_in(body: Mapping[str, Any], key: str, choices: tuple[Any, ...]) -> Any:
    value = body.get(key)
    if value not in choices:  # also of another type
        raise Refusal(f"{key} must be one of {', '.join(map(str, choices))}.")
    return value
