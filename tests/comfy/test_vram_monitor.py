"""The VRAM monitor and the telemetry routes in a running server."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from comfy_server import ComfyServer, WorkflowError
from PIL import Image
from telemetry_server import (
    EXPECTED,
    HISTORY,
    LEASE,
    MEGABYTES,
    allocation,
    is_sampling,
    refused,
    show,
    tags,
    wait_until,
)
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent

pytestmark = pytest.mark.comfy


def monitor(link: str, output: int = 0, **settings: Any) -> dict[str, Any]:
    inputs = {"reset_peak": False, "free_memory": False, "save_as": "JSON", "filename_prefix": "snug/test"}
    return {"class_type": "SnugVRAMMonitor", "inputs": {"value": [link, output], **inputs, **settings}}


def saved(server: ComfyServer, outputs: dict[str, Any], node: str = "monitor") -> Any:
    """What the monitor wrote, as JSON or text."""
    name = outputs[node]["text"][0].rpartition("Saved as ")[2]
    path = server.base / "output" / name
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def added(node: dict[str, Any]) -> int:
    return node["peak"]["cpu"] - node["before"]["cpu"]


def test_a_known_amount_is_reported_within_a_percent(comfy_server: ComfyServer) -> None:
    for megabytes in (MEGABYTES, 3 * MEGABYTES, MEGABYTES):  # prompts in a row know nothing of one another
        workflow = {"take": allocation(megabytes), "monitor": monitor("take")}
        found = saved(comfy_server, comfy_server.run(workflow))
        (node,) = found["nodes"]
        assert node["title"] == f"Take {megabytes} #take" and node["state"] == "done"
        assert added(node) == pytest.approx(megabytes << 20, rel=0.01)
        assert abs(node["after"]["cpu"] - node["before"]["cpu"]) < 0.05 * EXPECTED
        (ram,) = found["now"]["devices"]
        parts = ("weights", "pages", "activations", "cache", "other", "free")
        assert sum(ram[part] for part in parts) == ram["total"]
    wait_until(lambda: not is_sampling(comfy_server))


def test_the_monitor_tells_the_page_its_peak(comfy_server: ComfyServer) -> None:
    outputs = comfy_server.run({"take": allocation(), "monitor": monitor("take")})
    (peak,) = outputs["monitor"]["snug_memory"]
    (node,) = saved(comfy_server, outputs)["nodes"]
    assert peak == {"device": "cpu", "peak_bytes": node["peak"]["cpu"], "node": node["title"]}


def test_between_two_monitors(comfy_server: ComfyServer) -> None:
    """The first one resets: the second sees the node between them alone. The first sees none of what comes later."""
    workflow = {
        "large": allocation(2 * MEGABYTES),
        "first": monitor("large", reset_peak=True),
        "small": {**allocation(), "inputs": {**allocation()["inputs"], "after": ["first", 0]}},
        "monitor": monitor("small", save_as="CSV"),
    }
    outputs = comfy_server.run(workflow)
    assert [node["node_id"] for node in saved(comfy_server, outputs, "first")["nodes"]] == ["large"]
    (row,) = csv.DictReader(io.StringIO(saved(comfy_server, outputs)))
    assert row["node_id"] == "small" and row["device"] == "cpu"
    assert int(row["peak_bytes"]) - int(row["before_bytes"]) == pytest.approx(EXPECTED, rel=0.01)


def test_on_wires_of_a_sampling_workflow(
    comfy_server: ComfyServer, twins: Callable[[str, str], Twins], tmp_path: Path
) -> None:
    """The value comes through, the model is named with its format and user, and the picture is one."""
    file = twins("sd3", "Q4_0").gguf.name

    def build() -> Workflow:
        return build_workflow("sd3", "snug", file, steps=2, seed=next(tags))

    plain, watched = build(), build()
    watched["sampler"]["inputs"]["seed"] = plain["sampler"]["inputs"]["seed"]
    for name in ("positive", "negative"):
        watched[name] = plain[name]
    watched["between"] = monitor("model", save_as="nothing")
    watched["sampler"]["inputs"]["model"] = ["between", 0]
    watched["monitor"] = monitor("sampler")
    watched["save"]["inputs"]["samples"] = ["monitor", 0]
    watched["picture"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["monitor", 2], "filename_prefix": "t"},
    }
    first = saved_latent(comfy_server, comfy_server.run(plain))
    comfy_server.free()
    outputs = comfy_server.run(watched)
    assert saved_latent(comfy_server, outputs).equal(first)
    found = saved(comfy_server, outputs)
    (model,) = found["now"]["models"]
    assert "Q4_0" in model["formats"] and model["last_node"].endswith("#sampler")
    assert model["on_device"] + model["offloaded"] == model["total"] > 0
    nodes = {node["node_id"]: node for node in found["nodes"]}
    assert {"model", "sampler"} <= set(nodes) and "monitor" not in nodes
    assert len(nodes["sampler"]["steps"]) == 2
    assert outputs["between"]["text"][0].count("#") >= 1
    image = Image.open(io.BytesIO(comfy_server.view(outputs["picture"]["images"][0])))
    assert image.size == (1024, 576)
    assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_results_after_the_monitor_stay_cached(comfy_server: ComfyServer) -> None:
    workflow = {"take": allocation(1), "monitor": monitor("take"), "after": allocation(1)}
    workflow["after"]["inputs"]["after"] = ["monitor", 0]
    workflow["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["after", 0]}}
    entries = [comfy_server.wait(comfy_server.queue(workflow)) for _ in range(2)]
    messages = dict(entries[1]["status"]["messages"])
    assert set(messages["execution_cached"]["nodes"]) == set(workflow)


def test_memory_is_freed(comfy_server: ComfyServer, twins: Callable[[str, str], Twins]) -> None:
    workflow = build_workflow("sd3", "snug", twins("sd3", "Q8_0").gguf.name, steps=1, seed=next(tags))
    workflow["monitor"] = monitor("sampler", free_memory=True)
    outputs = comfy_server.run(workflow)
    assert outputs["monitor"]["text"][0].startswith("Freed before continuing: ")
    assert "unloaded: SD3" in outputs["monitor"]["text"][0]
    assert saved(comfy_server, outputs)["now"]["models"] == []


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../b", "C:\\x", "", "a\x00b", "x" * 300])
def test_names_that_leave_the_output_folder(comfy_server: ComfyServer, name: str) -> None:
    workflow = {"take": allocation(1), "monitor": monitor("take", filename_prefix=name)}
    with pytest.raises(WorkflowError, match="filename_prefix is") as caught:
        comfy_server.run(workflow)
    assert caught.value.node_type == "SnugVRAMMonitor"


def test_interrupted(comfy_server: ComfyServer) -> None:
    """The node that was stopped is in the history as such, sampling ends, and the next prompt is right."""
    workflow = {"take": allocation(64, seconds=60.0), "monitor": monitor("take")}
    prompt = comfy_server.queue(workflow)
    wait_until(lambda: bool((comfy_server.json(HISTORY)["running"] or {}).get("nodes")))
    comfy_server.interrupt()
    with pytest.raises(WorkflowError, match="interrupted"):
        comfy_server.wait(prompt, timeout=30)
    wait_until(lambda: not is_sampling(comfy_server))
    record = comfy_server.json(HISTORY)["prompts"][-1]
    assert record["prompt_id"] == prompt
    assert [node["state"] for node in record["nodes"]] == ["stopped"]
    found = saved(comfy_server, comfy_server.run({"take": allocation(), "monitor": monitor("take")}))
    assert added(found["nodes"][0]) == pytest.approx(EXPECTED, rel=0.01)


def test_lease_without_a_monitor(comfy_server: ComfyServer) -> None:
    """Two prompts in a row are recorded while somebody looks; without a lease nothing is, and the thread ends."""
    comfy_server.json(LEASE, {"client_id": "test", "seconds": 30})
    wait_until(lambda: is_sampling(comfy_server))
    prompts = [comfy_server.queue({"take": allocation(seconds=1.0), "show": show("take")}) for _ in range(2)]
    for prompt in prompts:
        comfy_server.wait(prompt)
    wait_until(lambda: comfy_server.json(HISTORY)["running"] is None)
    records = {record["prompt_id"]: record for record in comfy_server.json(HISTORY)["prompts"]}
    second = {node["node_id"]: node for node in records[prompts[1]]["nodes"]}
    assert added(second["take"]) == pytest.approx(EXPECTED, rel=0.01)
    assert 5 <= len(second["take"]["steps"]) <= 20  # newer ComfyUI does not tell of every step
    numbers = [sample["number"] for sample in comfy_server.json(HISTORY)["samples"]]
    assert numbers == sorted(set(numbers)) and len(numbers) >= 6
    after = comfy_server.json(f"{HISTORY}?since={numbers[-3]}")["samples"]
    assert [sample["number"] for sample in after][:2] == numbers[-2:]

    comfy_server.json(LEASE, {"client_id": "test", "seconds": 0})
    wait_until(lambda: not is_sampling(comfy_server))
    comfy_server.run({"take": allocation(1), "show": show("take")})
    assert not is_sampling(comfy_server)
    assert len(comfy_server.json(HISTORY)["prompts"]) == len(records)


def test_an_expired_lease(comfy_server: ComfyServer) -> None:
    comfy_server.json(LEASE, {"client_id": "test", "seconds": 1})
    wait_until(lambda: is_sampling(comfy_server))
    wait_until(lambda: not is_sampling(comfy_server), 5.0)


def test_only_subscribers_get_samples(comfy_server: ComfyServer) -> None:
    async def listen() -> dict[str, int]:
        counts: dict[str, int] = {"subscriber": 0, "other": 0}
        address = comfy_server.url.replace("http", "ws") + "/ws?clientId="
        async with aiohttp.ClientSession() as session:
            sockets = {name: await session.ws_connect(address + name) for name in counts}
            for name, push in (("subscriber", True), ("other", False)):
                body = {"client_id": name, "seconds": 30, "push": push}
                async with session.post(comfy_server.url + LEASE, json=body) as answer:
                    assert answer.status == 200

            async def count(name: str) -> None:
                async for message in sockets[name]:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        counts[name] += json.loads(message.data)["type"] == "snug.telemetry"

            counting = [asyncio.create_task(count(name)) for name in counts]
            await asyncio.sleep(3.5)
            for socket in sockets.values():
                await socket.close()
            await asyncio.gather(*counting)
        return counts

    counts = asyncio.run(listen())
    assert counts["subscriber"] >= 2 and counts["other"] == 0
    # The one that is gone is forgotten; the other holds a lease still.
    comfy_server.json(LEASE, {"client_id": "other", "seconds": 0})
    wait_until(lambda: not is_sampling(comfy_server), 5.0)


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"client_id": 3},
        {"client_id": ""},
        {"client_id": "x" * 129},
        {"client_id": "x", "seconds": -1},
        {"client_id": "x", "seconds": 1e9},
        {"client_id": "x", "seconds": True},
        {"client_id": "x", "seconds": float("nan")},
        {"client_id": "x", "push": "yes"},
        {"client_id": "nobody", "push": True},
        {"client_id": "x", "more": "y" * 5000},
    ],
)
def test_bad_leases_are_refused(comfy_server: ComfyServer, body: Any) -> None:
    assert refused(comfy_server, LEASE, body).endswith(".")


@pytest.mark.parametrize("since", ["-1", "x", "1" * 30, "%D9%A3"])
def test_bad_numbers_are_refused(comfy_server: ComfyServer, since: str) -> None:
    assert refused(comfy_server, f"{HISTORY}?since={since}").endswith("sample.")


def test_too_many_leases_are_refused(comfy_server: ComfyServer) -> None:
    names = [f"client {number}" for number in range(32)]
    for name in names:
        comfy_server.json(LEASE, {"client_id": name, "seconds": 20})
    assert "32 clients" in refused(comfy_server, LEASE, {"client_id": "one more"})
    for name in names:
        comfy_server.json(LEASE, {"client_id": name, "seconds": 0})
    wait_until(lambda: not is_sampling(comfy_server))
