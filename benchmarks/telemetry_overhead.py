"""What telemetry costs: the same prompts with a page that shows the memory, with that page hidden, and without it all.

    python benchmarks/telemetry_overhead.py --comfyui ~/ComfyUI --markdown benchmarks/results/telemetry-overhead.md \
        --json benchmarks/results/telemetry-overhead.json

Two real servers run prompts of a tiny model (sampling with KSampler): one with the pack, one with a copy of it that
does not register telemetry's routes. Four ways take turns, each time in another order: without telemetry; with the tab
hidden, so that nobody looks; with it open, a websocket client with a lease that gets every sample; with a monitor node
in the prompt, which also makes a report and a picture. The figures are ratios to the prompts without telemetry, turn by
turn (median and quartiles), of the seconds of a prompt and of the processor seconds of the whole server meanwhile. They
say something on a machine that has nothing else to do, and little on a busy one.

The last table goes by processor time of the very calls, which others hardly change: a sample, of which five are taken
in a second, its message to a client, the start and end of a node, and the report with its picture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

import aiohttp
import psutil
from report import add_output_arguments, command_line, environment, heading, save, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]
from comfy_server import ComfyServer, execution_seconds  # noqa: E402
from snug_path import register_snug  # noqa: E402
from tiny import make_tiny_model, use_comfyui  # noqa: E402

register_snug()

from workflows import Workflow, build_workflow  # noqa: E402

EVENT = "snug.telemetry"

WITHOUT, HIDDEN, OPEN, MONITOR = "no telemetry", "the tab hidden", "the tab open", "a monitor node"
WAYS = (WITHOUT, HIDDEN, OPEN, MONITOR)
FAMILY, FILE = "sd3", "model.safetensors"
LEASE, LEASE_SECONDS, CLIENT = "/snug/telemetry/lease", 60, "benchmark"
REGISTRATION = "        register_routes()\n"

Measured = tuple[float, float]


def copy_without_telemetry(folder: Path) -> Path:
    """The pack as it would be without telemetry's routes; returns its folder."""
    pack = folder / "ComfyUI-Snug"
    pack.mkdir()
    for name in ("__init__.py", "nodes", "quant_backends", "web", "locales", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, pack / name)
    start = pack / "nodes" / "__init__.py"
    text = start.read_text(encoding="utf-8")
    if REGISTRATION not in text:
        raise SystemExit(f"{start.name} does not register routes as this benchmark expects.")
    start.write_text(text.replace(REGISTRATION, ""), encoding="utf-8")
    return pack


class Tab:
    """A client on a websocket that reads all that it is sent, as the page does. samples: how many that were."""

    def __init__(self, server: ComfyServer) -> None:
        self.samples = 0
        self._url = f"{server.url}/ws?clientId={CLIENT}"
        self._is_connected = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._read()), daemon=True).start()
        if not self._is_connected.wait(30):
            raise SystemExit("The server accepts no websocket.")

    async def _read(self) -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._url) as socket:
            self._is_connected.set()
            async for message in socket:
                self.samples += message.type is aiohttp.WSMsgType.TEXT and EVENT in message.data


def workflow(steps: int, seed: int, monitored: bool) -> Workflow:
    made = build_workflow(FAMILY, "snug", FILE, steps=steps, seed=seed)
    if monitored:
        settings = {"reset_peak": False, "free_memory": False, "save_as": "nothing", "filename_prefix": "x"}
        made["monitor"] = {"class_type": "SnugVRAMMonitor", "inputs": {"value": ["sampler", 0], **settings}}
    return made


def measure(server: ComfyServer, way: str, steps: int, seed: int) -> Measured:
    """(seconds of the prompt, processor seconds of the server meanwhile)"""
    if way != WITHOUT:
        is_open = way == OPEN
        seconds = LEASE_SECONDS if is_open else 0
        server.json(LEASE, {"client_id": CLIENT, "seconds": seconds, "push": is_open})
        while server.json("/snug/telemetry/snapshot")["is_sampling"] is not is_open:
            time.sleep(0.05)
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    entry = server.wait(server.queue(workflow(steps, seed, way == MONITOR)))
    after = process.cpu_times()
    return execution_seconds(entry), after.user + after.system - before.user - before.system


def compare(servers: dict[str, ComfyServer], turns: int, steps: int) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for way in WAYS:
        measure(servers[way], way, steps, WAYS.index(way))  # warms up
    for turn in range(1, turns + 1):
        for way in random.Random(turn).sample(WAYS, len(WAYS)):
            # Another seed each time, or ComfyUI would have the result already.
            seed = turn * len(WAYS) + WAYS.index(way)
            found[way].append(measure(servers[way], way, steps, seed))
        print(f"turn {turn}:", *(f"{way} {found[way][-1][0]:.2f} s" for way in WAYS), sep="  ")
    return found


def ratios(found: dict[str, list[Measured]], way: str, which: int) -> str:
    """Of seconds (0) or processor seconds (1) to those without telemetry, turn by turn: median and quartiles."""
    values = [one[which] / other[which] for one, other in zip(found[way], found[WITHOUT], strict=True)]
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.3f} ({low:.3f} to {high:.3f})"


def parts(repeats: int) -> dict[str, float]:
    """Processor seconds of each part, the median of many."""
    from snug.nodes.telemetry.chart import draw_timeline
    from snug.nodes.telemetry.report import pushed_data, report_text
    from snug.nodes.telemetry.service import Telemetry

    service = Telemetry(lambda _: True, lambda _: None, lambda *_: None)
    service.monitor()
    service.leases.clear()

    def node() -> None:
        service.node_started("1", "KSampler #1")
        service.node_finished("1")

    for _ in range(100):
        service._sample()
    record, sample = service.monitor(), service.take()
    calls: dict[str, Callable[[], object]] = {
        "a sample": service._sample,
        "its message to a client": lambda: json.dumps(pushed_data(1, sample, [])),
        "start and end of a node": node,
        "report": lambda: report_text(record, sample),
        "picture": lambda: draw_timeline(record, time.time()),
    }
    return {name: median(_processor_seconds(call) for _ in range(repeats)) for name, call in calls.items()}


def _processor_seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100, help="of the sampler, per prompt")
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(comfyui="ComfyUI")  # importing ComfyUI changes the arguments
    use_comfyui(options.comfyui)
    tests = ROOT / "tests" / "comfy" / "custom_nodes" / "snug_test_nodes"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        make_tiny_model(FAMILY, root / FILE)
        servers: list[ComfyServer] = []
        for pack in (ROOT, copy_without_telemetry(root)):
            base = root / f"server {len(servers)}"
            models = base / "models" / "diffusion_models"
            models.mkdir(parents=True)
            shutil.copy(root / FILE, models)
            packs = {"ComfyUI-Snug": pack, tests.name: tests}
            server = ComfyServer(Path(sys.executable), options.comfyui, base, packs)
            servers.append(stack.enter_context(server))
        tab = Tab(servers[0])
        found = compare({way: servers[way == WITHOUT] for way in WAYS}, options.turns, options.steps)
    if not tab.samples:
        raise SystemExit("The open tab got no samples: its figures say nothing.")
    alone = parts(100)
    from snug.nodes.telemetry.service import RUNNING

    rows = [
        [way, f"{median(s for s, _ in found[way]):.2f}", ratios(found, way, 0), ratios(found, way, 1)]
        for way in WAYS
    ]
    load = [f"{value:.1f}" for value in psutil.getloadavg()[:2]]
    facts = {**environment(), "load": f"{load[0]} in the last minute, {load[1]} in the last five"}
    text = heading("Overhead of telemetry", command, facts)
    text += "\n" + table(
        ["prompts with", "seconds, median", "seconds, ratio", "processor seconds, ratio"], rows
    )
    if psutil.getloadavg()[0] > (psutil.cpu_count() or 1):
        text += "\n\nOther programs had more to do than the machine could: these ratios are their noise. See below.\n"
    share = (alone["a sample"] + alone["its message to a client"]) / RUNNING
    text += "\n\n" + table(
        ["part", "processor ms"], [[name, f"{seconds * 1e3:.3f}"] for name, seconds in alone.items()]
    )
    text += f"\n\nSamples and messages of a running prompt are {share:.2%} of one core: a ratio of {1 + share:.4f}.\n"
    print(text)
    save(options, text, {"environment": facts, "prompts": found, "parts": alone})


if __name__ == "__main__":
    main()
