"""Steps of offloaded models beside the slower of copying and computing, on a simulated device and a real one.

    python benchmarks/offload_plan.py --markdown benchmarks/results/offload-plan.md \
        --json benchmarks/results/offload-plan.json

Models are lists of blocks in the sizes of real ones, or made uneven; computing goes with their bytes. For each ratio
of copying to computing the plan is made and run for several steps, until the pipeline is full; the figure is the
time of a step by max(copying, computing), and 1.00 cannot be beaten. Sizes are scaled down on the simulated device,
which changes no figure.

With a CUDA device the same executor streams blocks of real size there. Its link is measured first. Each block
computes one matrix product that lasts as long as the ratio asks for, on weights that stay; the time of a step is
that between events, and computing alone is measured in the same run.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug

register_snug()

from snug.quant_backends.memory.executor import GroupOffload  # noqa: E402
from snug.quant_backends.memory.plan import Block, OffloadPlan, make_plan  # noqa: E402
from snug.quant_backends.memory.simulated import simulate  # noqa: E402
from snug.quant_backends.memory.transfer import StreamTransfer  # noqa: E402

RATIOS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0, 3.0)
FLUX = [340] * 19 + [141] * 38
# MB of each block, in the order of execution.
MODELS = {
    "Flux, 8-bit": FLUX,
    "Flux, mixed formats (±15%)": [
        round(size * random.Random(size + n).uniform(0.85, 1.15)) for n, size in enumerate(FLUX)
    ],
    "60 equal blocks": [330] * 60,
    "20 equal blocks": [300] * 20,
    "30 blocks (±30%)": [round(300 * random.Random(n).uniform(0.7, 1.3)) for n in range(30)],
    "big and small in turn": [300, 150] * 20,
}
KEPT = (0.0, 0.2, 0.5)
SCALE_MB = 512  # bytes that stand for one MB on the simulated device
STEPS, WARM_UP = 8, 4
TENSOR = 2048  # rows and columns of the matrices that the real device multiplies


def plan_for(sizes: Sequence[int], megabyte: int, kept: float, ratio: float, link: float) -> OffloadPlan:
    """Copying what is streamed takes `ratio` times as long as computing all blocks."""
    blocks = [Block(str(index), (size * megabyte,)) for index, size in enumerate(sizes)]
    total = sum(sizes) * megabyte
    keep = int(kept * total)
    per_byte = make_plan(blocks, keep=keep, link=link).transfer_seconds / ratio / total
    timed = [Block(block.name, block.sizes, block.nbytes * per_byte) for block in blocks]
    return make_plan(timed, keep=keep, link=link)


def simulated_row(sizes: Sequence[int], kept: float, ratios: Sequence[float]) -> list[float]:
    def excess(ratio: float) -> float:
        plan = plan_for(sizes, SCALE_MB, kept, ratio, link=1e6)
        return simulate(plan) / max(plan.compute_seconds, plan.transfer_seconds)

    return [excess(ratio) for ratio in ratios]


class Device:
    """A CUDA device with its link and its matrix products measured."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._a = torch.randn(TENSOR, TENSOR, device=self.device, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._a)
        self.product_seconds = self._seconds(self._multiply, 200)
        host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=self.device)
        self.link = host.nbytes / self._seconds(partial(there.copy_, host, non_blocking=True), 10)

    def _multiply(self) -> None:
        torch.mm(self._a, self._a, out=self._out)

    def _seconds(self, work: object, times: int) -> float:
        """Of one of `times` calls, after as many that are not counted."""
        assert callable(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(times):
            work()
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times

    def step(self, plan: OffloadPlan, offload: GroupOffload | None) -> float:
        """Seconds of a step, the median of several; without `offload` that of computing alone."""
        products = [max(1, round(block.seconds / self.product_seconds)) for block in plan.blocks]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + STEPS + 1)]
        for mark in marks:
            mark.record()
            for block, count in enumerate(products):
                if offload:
                    offload.acquire(block)
                for _ in range(count):
                    self._multiply()
                if offload:
                    offload.release(block)
        torch.cuda.synchronize()
        pairs = list(zip(marks, marks[1:], strict=False))[WARM_UP:]
        return median(before.elapsed_time(after) / 1000 for before, after in pairs)

    def row(self, sizes: Sequence[int], kept: float, ratios: Sequence[float]) -> list[float]:
        def excess(ratio: float) -> float:
            plan = plan_for(sizes, 1 << 20, kept, ratio, self.link)
            weights = torch.zeros(max(block.nbytes for block in plan.blocks), dtype=torch.uint8)
            source = [[weights[: block.sizes[0]]] for block in plan.blocks]
            offload = GroupOffload(plan, source.__getitem__, StreamTransfer(self.device))
            try:
                return self.step(plan, offload) / max(self.step(plan, None), plan.transfer_seconds)
            finally:
                offload.close()

        return [excess(ratio) for ratio in ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_output_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="of copying to computing")
    options = parser.parse_args()

    facts = environment()
    runs = {"simulated": simulated_row}
    if torch.cuda.is_available():
        device = Device()
        name = torch.cuda.get_device_name(device.device)
        facts["device"] = f"{name}, {device.link / 1e9:.1f} GB/s from pinned memory"
        runs[name] = device.row

    header = ["model", "stays", "device", *(f"{ratio:g}" for ratio in options.ratios), "worst"]
    rows, figures = [], []
    for model in options.models:
        for kept in KEPT:
            for where, run in runs.items():
                found = run(MODELS[model], kept, options.ratios)
                worst = max(found)
                figures.append(
                    {
                        "model": model,
                        "kept": kept,
                        "device": where,
                        "step": dict(zip(options.ratios, found, strict=True)),
                    }
                )
                rows.append(
                    [model, f"{kept:.0%}", where, *(f"{value:.3f}" for value in found), f"{worst:.3f}"]
                )
                print(*rows[-1], flush=True)
                text = heading(
                    "Steps with streamed weights by max(copying, computing)", command_line(), facts
                )
                text += f"\nColumns: copying as a multiple of computing.\n\n{table(header, rows)}\n"
                save(options, text, {"environment": facts, "figures": figures})


if __name__ == "__main__":
    main()
