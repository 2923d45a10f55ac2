"""What tests ask of telemetry in a running server."""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest
from comfy_server import ComfyServer

MEGABYTES = 256
EXPECTED = MEGABYTES << 20
LEASE, SNAPSHOT, HISTORY, DIAGNOSTICS, EXPORT, FORECAST = (
    f"/snug/telemetry/{name}"
    for name in ("lease", "snapshot", "history", "diagnostics", "export", "forecast")
)
INSPECT, FILES = "/snug/inspect", "/snug/inspect/files"
tags = itertools.count(1)


def allocation(megabytes: int = MEGABYTES, seconds: float = 0.0, after: str | None = None) -> dict[str, Any]:
    links = {"after": [after, 0]} if after else {}
    inputs = {"megabytes": megabytes, "seconds": seconds, "tag": next(tags), **links}
    return {"class_type": "SnugTestAllocate", "inputs": inputs, "_meta": {"title": f"Take {megabytes}"}}


def refused(server: ComfyServer, path: str, body: Any = None) -> str:
    """The sentence of an answer 4xx."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.request(path, body)
    assert 400 <= caught.value.code < 500
    return json.loads(caught.value.read())["error"]


def wait_until(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_sampling(server: ComfyServer) -> bool:
    return server.json(SNAPSHOT)["is_sampling"]


def show(link: str) -> dict[str, Any]:
    return {"class_type": "PreviewAny", "inputs": {"source": [link, 0]}}
