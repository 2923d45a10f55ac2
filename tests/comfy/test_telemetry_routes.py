"""What the routes of a running server answer, to right and to wrong requests."""

from __future__ import annotations

import csv
import io
import json
import random
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, WorkflowError
from telemetry_server import (
    DIAGNOSTICS,
    EXPECTED,
    EXPORT,
    FILES,
    FORECAST,
    HISTORY,
    INSPECT,
    LEASE,
    allocation,
    is_sampling,
    refused,
    show,
    tags,
    wait_until,
)
from twins import Twins
from workflows import build_workflow

pytestmark = pytest.mark.comfy
TOO_MUCH = 1 << 30  # MB


@pytest.fixture
def looking(comfy_server: ComfyServer) -> Any:
    """Somebody looks during the test."""
    wait_until(lambda: not is_sampling(comfy_server))
    comfy_server.json(LEASE, {"client_id": "looking", "seconds": 60})
    before = comfy_server.json(HISTORY)["events"]
    wait_until(lambda: is_sampling(comfy_server) and bool(comfy_server.json(HISTORY)["samples"]))
    yield before[-1]["number"] if before else 0
    comfy_server.json(LEASE, {"client_id": "looking", "seconds": 0})
    wait_until(lambda: not is_sampling(comfy_server))


def test_loads_and_unloads(
    comfy_server: ComfyServer, twins: Callable[[str, str], Twins], looking: int
) -> None:
    comfy_server.free()
    workflow = build_workflow("sd3", "snug", twins("sd3", "Q4_0").gguf.name, steps=2, seed=next(tags))
    comfy_server.run(workflow)

    def events(kind: str) -> list[Any]:
        known = comfy_server.json(f"{HISTORY}?since={looking}")["events"]
        return [event for event in known if event["kind"] == kind]

    wait_until(lambda: bool(events("load")))
    (load,) = events("load")
    (model,) = comfy_server.json("/snug/telemetry/snapshot")["models"]
    assert (load["model"], load["device"], load["bytes"]) == ("SD3", "cpu", model["total"])
    assert load["node"].endswith("#sampler")
    last = load["number"]
    comfy_server.free()
    wait_until(lambda: bool(events("unload")))
    (unload,) = events("unload")
    assert (unload["model"], unload["bytes"], unload["number"] > last) == ("SD3", model["total"], True)
    assert "node" not in unload
    assert all(event["number"] > last for event in comfy_server.json(f"{HISTORY}?since={last}")["events"])


def test_prompts_that_run_out_of_memory_are_counted(comfy_server: ComfyServer, looking: int) -> None:
    def ooms() -> int:
        return comfy_server.json(HISTORY)["counters"]["cpu"]["ooms"]

    before = ooms()
    with pytest.raises(WorkflowError):
        comfy_server.run({"take": allocation(TOO_MUCH), "show": show("take")})
    wait_until(lambda: ooms() == before + 1)
    event = comfy_server.json(HISTORY)["events"][-1]
    assert (event["kind"], event["device"]) == ("oom", "cpu")
    assert event["node"] == f"Take {TOO_MUCH} #take"


def test_exports(comfy_server: ComfyServer, looking: int) -> None:
    # Telemetry is told of a prompt a moment after it began, when somebody looks and there is no monitor in it.
    workflow = {"first": allocation(1, seconds=0.3), "take": allocation(after="first"), "show": show("take")}
    prompt = comfy_server.queue(workflow)
    comfy_server.wait(prompt)
    wait_until(lambda: comfy_server.json(HISTORY)["running"] is None)

    def exported(format: str) -> str:
        name = comfy_server.json(EXPORT, {"format": format, "prompt_id": prompt})["path"]
        assert name.startswith("snug/memory_") and name.endswith(f".{format}")
        return (comfy_server.base / "output" / name).read_text(encoding="utf-8")

    record = next(r for r in comfy_server.json(HISTORY)["prompts"] if r["prompt_id"] == prompt)
    as_json = json.loads(exported("json"))
    assert {key: as_json[key] for key in record} == record
    assert as_json["now"]["devices"] and as_json["events"] == []
    rows = {row["node_id"]: row for row in csv.DictReader(io.StringIO(exported("csv")))}
    nodes = {node["node_id"]: node for node in record["nodes"]}
    assert rows.keys() == nodes.keys()
    assert int(rows["take"]["peak_bytes"]) == nodes["take"]["peak"]["cpu"]
    assert nodes["take"]["added"]["cpu"] == pytest.approx(EXPECTED, rel=0.01)


def test_diagnostics(comfy_server: ComfyServer, looking: int) -> None:
    text = comfy_server.request(DIAGNOSTICS).decode()
    found = json.loads(text)
    versions = found["versions"]
    assert all(versions[name] for name in ("snug", "comfyui", "python", "torch", "comfy-kitchen", "system"))
    assert {backend["name"] for backend in found["backends"]} >= {"gguf", "bitsandbytes", "torchao"}
    assert [device["name"] for device in found["devices"]] == ["cpu"]
    assert found["options"]["cpu"] is True and found["options"]["base_directory"] == "(given)"
    assert 1 <= len(found["last_minute"]) <= 62
    for secret in (str(Path.home()), str(comfy_server.base), "sqlite"):
        assert secret not in text


def test_forecast_and_inspection(comfy_server: ComfyServer, twins: Callable[[str, str], Twins]) -> None:
    pair = twins("sd3", "Q4_0")
    files = [{"folder": "diffusion_models", "name": path.name} for path in (pair.gguf, pair.dense)]
    assert all(file in comfy_server.json(FILES)["files"] for file in files)
    found = comfy_server.json(FORECAST, {"files": [*files, {"folder": "vae", "name": "gone.safetensors"}]})
    *known, gone = found["files"]
    assert gone["weights_bytes"] is None and "gone.safetensors" in gone["error"]
    assert found["total_bytes"] == sum(file["weights_bytes"] for file in known)
    assert found["device"] == "cpu" and found["free_bytes"] > 0 and found["offloaded_bytes"] >= 0

    report = comfy_server.json(INSPECT, {**files[0], "width": 512, "height": 768, "batch_size": 2})
    assert report["fit"]["weights"] == known[0]["weights_bytes"]
    assert report["text"].startswith(f"File: {pair.gguf.name}") and "512 × 768, batch of 2" in report["text"]
    workflow = build_workflow("sd3", "snug", pair.gguf.name, steps=1, seed=next(tags), model_info=True)
    info = json.loads(comfy_server.run(workflow)["info"]["model_info"][0])
    assert report["fit"]["weights"] == pytest.approx(info["model_size"], rel=0.01)

    pair.gguf.write_bytes(pair.gguf.read_bytes()[:-1000])
    assert "the file ends at" in refused(comfy_server, INSPECT, files[0])
    (broken,) = comfy_server.json(FORECAST, {"files": files[:1]})["files"]
    assert "the file ends at" in broken["error"]


FILE = {"folder": "diffusion_models", "name": "x.gguf"}
OUTSIDE = [
    "../x.gguf",
    "/etc/passwd",
    "a/../../x.safetensors",
    "C:\\x.gguf",
    "x.gguf\x00",
    "",
    3,
    None,
    ["x"],
]
WRONG = [
    *((INSPECT, {**FILE, "name": name}) for name in OUTSIDE),
    *(
        (INSPECT, {**FILE, "folder": folder})
        for folder in ("..", "", "configs", "custom_nodes", {}, "x" * 99)
    ),
    *((INSPECT, {**FILE, "width": width}) for width in (0, 15, 1 << 20, 64.5, "64", True, None)),
    (INSPECT, {**FILE, "batch_size": 0}),
    (INSPECT, {**FILE, "more": "y" * 20_000}),
    *((FORECAST, {"files": files}) for files in (None, {}, "x", [3], [FILE] * 17, [{**FILE, "name": 3}])),
    (FORECAST, {"files": [{**FILE, "name": "x" * 200_000}]}),
    *((EXPORT, {"format": kind, "prompt_id": "x"}) for kind in ("xml", "", None, ["csv"], "../csv")),
    *((EXPORT, {"format": "csv", "prompt_id": name}) for name in ("gone", "", None, 7, "x" * 200, "../x")),
    *(
        (path, body)
        for path in (LEASE, INSPECT, FORECAST, EXPORT)
        for body in ([], "x", 3, None, {}, [[]] * 9)
    ),
]


def test_wrong_requests_are_refused(comfy_server: ComfyServer) -> None:
    """Each with a 4xx and a sentence, and nothing is written."""
    output = comfy_server.base / "output"
    before = sorted(output.rglob("*"))
    for path, body in WRONG:
        sentence = refused(comfy_server, path, body if body is not None else "null")
        assert sentence.endswith(".") and "\n" not in sentence, (path, body)
    assert sorted(output.rglob("*")) == before


def test_random_bytes_are_refused(comfy_server: ComfyServer) -> None:
    chance = random.Random(7)
    for number in range(60):
        path = chance.choice((LEASE, INSPECT, FORECAST, EXPORT))
        body = chance.randbytes(chance.choice((0, 1, 40, 3000)))
        if number % 3 == 0:  # JSON up to where it is cut
            body = json.dumps({"files": [FILE], "client_id": "x", **FILE}).encode()[: chance.randrange(1, 90)]
        request = urllib.request.Request(comfy_server.url + path, data=body)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code in (400, 413) and json.loads(caught.value.read())["error"].endswith(".")


def test_a_body_that_comes_in_pieces(comfy_server: ComfyServer) -> None:
    """As browsers and proxies may send it."""
    body = json.dumps({"client_id": "pieces", "seconds": 0}).encode()
    head = f"POST {LEASE} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", comfy_server.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + body[:9])
        is_sampling(comfy_server)  # the server has read that
        connection.sendall(body[9:])
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("looking")
def test_prompts_that_are_known_are_left_out(comfy_server: ComfyServer) -> None:
    comfy_server.run({"take": allocation(1), "show": show("take")})
    wait_until(lambda: comfy_server.json(HISTORY)["running"] is None)
    ends = [prompt["ended"] for prompt in comfy_server.json(HISTORY)["prompts"]]
    later = comfy_server.json(f"{HISTORY}?since=0&ended_after={ends[-2] if len(ends) > 1 else 0}")
    assert [prompt["ended"] for prompt in later["prompts"]] == ends[-1:]
    assert comfy_server.json(f"{HISTORY}?ended_after={ends[-1]}")["prompts"] == []
    for wrong in ("-1", "x", "1" * 20, "1.", "nan"):
        assert "ended_after is" in refused(comfy_server, f"{HISTORY}?ended_after={wrong}")
