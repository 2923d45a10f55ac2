"""What starting a GPU kernel takes of the host's time: Snug's dispatch, Triton's launcher in Python, allocation.

    python benchmarks/kernel_launch.py --markdown benchmarks/results/kernel-launch.md \
        --json benchmarks/results/kernel-launch.json

Needs no GPU: a stand-in takes the place of Triton's driver, so everything runs up to the call that hands the kernel to
it, which is not made and takes a few microseconds more. Times are of the calling thread, the best of many rounds, so
that neither the kernels nor other processes count; "add" is torch.add of four numbers in the same run, for comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

for folder in ("scripts", "tests/support"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
from snug_path import register_snug  # noqa: E402

register_snug()
from random_packed import random_packed  # noqa: E402
from snug.quant_backends.kernels import dispatch  # noqa: E402
from snug.quant_backends.kernels.dequantize import dequantize_packed  # noqa: E402
from snug.quant_backends.kernels.linear import linear  # noqa: E402
from snug.quant_backends.kernels.low_rank import decode_merged  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

FORMATS = ("Q8_0", "Q4_K", "IQ2_XS", "bnb-nf4-64", "bnb-nf4-64-nested-256", "int8-rows", "quanto-int4-128")
SHAPE, RANK = (64, 512), 16
CALLS, ROUNDS = 20, 200
LIMIT = 60  # microseconds of a whole layer


class Driver:
    """Knows a GPU that is not there, and starts nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_, **__: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call, in the best round; compiles before."""
    for _ in range(CALLS):
        call()
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time_ns() - started)
    return best / CALLS / 1e3


def measure(name: str) -> dict[str, float]:
    packed = random_packed(name, SHAPE)
    rows, columns = SHAPE
    x, bias = torch.zeros(1, columns, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.bfloat16)
    up, down = torch.zeros(rows, RANK, dtype=x.dtype), torch.zeros(RANK, columns, dtype=x.dtype)
    four = torch.zeros(4)
    return {
        "decode": microseconds(lambda: dequantize_packed(packed, x.dtype)),
        "decode with a LoRA": microseconds(lambda: decode_merged(packed, down, up, x.dtype)),
        "linear, 1 token": microseconds(lambda: linear(x, packed, bias)),
        "add": microseconds(lambda: four + four),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    with (
        torch.inference_mode(),
        dispatch.using(dispatch.TRITON),
        patch.object(dispatch, "_missing", lambda device: None),
    ):
        times = {name: measure(name) for name in FORMATS}
    command, facts = command_line(), environment("triton")
    text = "\n\n".join(
        [
            heading("Host time of starting GPU kernels", command, facts),
            f"Microseconds of a call; a layer is to take {LIMIT} at most, all told.",
            table(
                ["format", *times[FORMATS[0]]],
                [[n, *(f"{v:.1f}" for v in t.values())] for n, t in times.items()],
            ),
        ]
    )
    print(text)
    save(options, text + "\n", {"command": command, "environment": facts, "microseconds": times})


if __name__ == "__main__":
    main()
