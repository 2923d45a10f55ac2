"""Routes of ComfyUI's server that tell of files from their headers; files are named as in ComfyUI's own lists.

GET  /snug/inspect/files       {"files": [{"folder", "name"}]}
POST /snug/inspect             {"folder", "name", "width", "height", "batch_size"}: the report of Model Inspector as
                               data, with "text"
POST /snug/telemetry/forecast  {"files": [{"folder", "name"}]}: what they take on the device once they are loaded
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aiohttp import web

from ...quant_backends.inspection.report import report
from ..adapter.computing import ImageSize
from ..adapter.forecast import forecast
from ..adapter.model_inspector import NotListedError, find_listed, inspect_file, listed_files
from ..image_size_inputs import LARGEST_BATCH, LARGEST_IMAGE, SMALLEST_IMAGE, USUAL_IMAGE
from .requests import LONGEST_NAME, Refusal, answering, body_of, elsewhere, text_in, whole_number_in

MOST_FILES = 16
# Each letter of a name may be written as \uXXXX.
LONGEST_FILE = 8 * LONGEST_NAME


def register(routes: Any) -> None:
    routes.get("/snug/inspect/files")(answering(files))
    routes.post("/snug/inspect")(answering(inspect))
    routes.post("/snug/telemetry/forecast")(answering(show_forecast))


async def files(request: web.Request) -> dict[str, Any]:
    listed = await elsewhere(listed_files)
    return {"files": [{"folder": folder, "name": name} for folder, name in listed]}


async def inspect(request: web.Request) -> dict[str, Any]:
    body = await body_of(request, LONGEST_FILE)
    folder, name = _file_in(body)
    size = ImageSize(
        whole_number_in(body, "width", USUAL_IMAGE, SMALLEST_IMAGE, LARGEST_IMAGE),
        whole_number_in(body, "height", USUAL_IMAGE, SMALLEST_IMAGE, LARGEST_IMAGE),
        whole_number_in(body, "batch_size", 1, 1, LARGEST_BATCH),
    )
    return await elsewhere(_inspect, folder, name, size)


def _inspect(folder: str, name: str, size: ImageSize) -> dict[str, Any]:
    try:
        path = find_listed(folder, name)
    except NotListedError as error:
        raise Refusal(str(error), 404) from None
    summary = inspect_file(path, size)
    return {**summary.as_dict(), "text": report(summary)}


async def show_forecast(request: web.Request) -> dict[str, Any]:
    body = await body_of(request, MOST_FILES * LONGEST_FILE)
    entries = body.get("files")
    if not isinstance(entries, list) or len(entries) > MOST_FILES:
        raise Refusal(f"files must be a list of at most {MOST_FILES} objects with folder and name.")
    return asdict(await elsewhere(forecast, [_file_in(entry) for entry in entries]))


def _file_in(body: Any) -> tuple[str, str]:
    if not isinstance(body, Mapping):
        raise Refusal("A file must be an object with folder and name.")
    return text_in(body, "folder", 64), text_in(body, "name")
