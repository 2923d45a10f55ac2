"""What looking at the memory costs: prompts with nobody looking, with a client's lease and with a monitor node.

    python benchmarks/telemetry_overhead.py --comfyui ~/ComfyUI --markdown benchmarks/results/telemetry-overhead.md \
        --json benchmarks/results/telemetry-overhead.json

One real server runs prompts of a tiny model (sampling with KSampler) in which the three take turns, each time in
another order. The figures are ratios to the prompts that nobody looked at: of the seconds of the fastest, and of the
processor seconds of the whole server, turn by turn (median and quartiles). They say something on a machine that has
nothing else to do, and little on a busy one. A prompt with a monitor node also makes the report and its picture.

The last table goes by processor time of the very calls, which others hardly change: a sample, of which five are taken
in a second, the start and end of a node, and the report with its picture.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import psutil
from report import add_output_arguments, command_line, environment, heading, save, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]
from comfy_server import ComfyServer, execution_seconds  # noqa: E402
from snug_path import register_snug  # noqa: E402
from tiny import make_tiny_model, use_comfyui  # noqa: E402

register_snug()

from workflows import Workflow, build_workflow  # noqa: E402

NOBODY, LEASE, MONITOR = "nobody looks", "a client's lease", "a monitor node"
FAMILY, FILE = "sd3", "model.safetensors"
LEASE_SECONDS = 60
CLIENT = "benchmark"


def workflow(steps: int, seed: int, monitored: bool) -> Workflow:
    made = build_workflow(FAMILY, "snug", FILE, steps=steps, seed=seed)
    if monitored:
        settings = {"reset_peak": False, "free_memory": False, "save_as": "nothing", "filename_prefix": "x"}
        made["monitor"] = {"class_type": "SnugVRAMMonitor", "inputs": {"value": ["sampler", 0], **settings}}
    return made


def measure(server: ComfyServer, way: str, steps: int, seed: int) -> tuple[float, float]:
    """(seconds of the prompt, processor seconds of the server meanwhile)"""
    seconds = LEASE_SECONDS if way == LEASE else 0
    server.json("/snug/telemetry/lease", {"client_id": CLIENT, "seconds": seconds})
    while server.json("/snug/telemetry/snapshot")["is_sampling"] is not (way == LEASE):
        time.sleep(0.05)
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    entry = server.wait(server.queue(workflow(steps, seed, way == MONITOR)))
    after = process.cpu_times()
    return execution_seconds(entry), after.user + after.system - before.user - before.system


def compare(server: ComfyServer, turns: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    ways = [NOBODY, LEASE, MONITOR]
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    measure(server, MONITOR, steps, 0)  # warms up
    for turn in range(1, turns + 1):
        for way in random.Random(turn).sample(ways, len(ways)):
            found[way].append(measure(server, way, steps, turn * len(ways) + ways.index(way)))
        print(f"turn {turn}:", *(f"{way} {found[way][-1][0]:.2f} s" for way in ways), sep="  ")
    return found


def fastest(found: dict[str, list[tuple[float, float]]], way: str) -> float:
    return min(seconds for seconds, _ in found[way])


def processor_ratios(found: dict[str, list[tuple[float, float]]], way: str) -> list[float]:
    return [seen / unseen for (_, seen), (_, unseen) in zip(found[way], found[NOBODY], strict=True)]


def with_quartiles(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.3f} ({low:.3f} to {high:.3f})"


def parts(repeats: int) -> dict[str, float]:
    """Processor seconds of each part, the median of many."""
    from snug.nodes.telemetry.chart import draw_timeline
    from snug.nodes.telemetry.report import report_text
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
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models" / "diffusion_models"
        models.mkdir(parents=True)
        make_tiny_model(FAMILY, models / FILE)
        tests = ROOT / "tests" / "comfy" / "custom_nodes" / "snug_test_nodes"
        packs = {"ComfyUI-Snug": ROOT, tests.name: tests}
        with ComfyServer(Path(sys.executable), options.comfyui, Path(folder), packs) as server:
            found = compare(server, options.turns, options.steps)
    alone = parts(100)
    from snug.nodes.telemetry.service import RUNNING

    rows = [
        [
            way,
            f"{fastest(found, way):.2f}",
            f"{fastest(found, way) / fastest(found, NOBODY):.3f}",
            with_quartiles(processor_ratios(found, way)),
        ]
        for way in found
    ]
    load = [f"{value:.1f}" for value in psutil.getloadavg()[:2]]
    facts = {**environment(), "load": f"{load[0]} in the last minute, {load[1]} in the last five"}
    text = heading("Overhead of telemetry", command, facts)
    text += "\n" + table(["prompts with", "fastest, seconds", "ratio", "processor seconds, ratio"], rows)
    share = alone["a sample"] / RUNNING
    text += "\n\n" + table(
        ["part", "processor ms"], [[name, f"{seconds * 1e3:.3f}"] for name, seconds in alone.items()]
    )
    text += f"\n\nThe samples of a running prompt are {share:.2%} of one core: a ratio of {1 + share:.4f}.\n"
    print(text)
    save(options, text, {"environment": facts, "prompts": found, "parts": alone})


if __name__ == "__main__":
    main()
