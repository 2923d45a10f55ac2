"""Cycles of load, sample, change settings and unload, in a process of its own, which prints what memory they leave.

    python memory_cycles.py COMFYUI FILE DENSE CYCLES [--leak tensors|slab]

FILE, DENSE: a quantized tiny SD3 and its dense twin. --leak: keeps something of each cycle, as a bug would. Prints
JSON: for every tenth cycle the `private` bytes of the process, the bytes of host memory that offloading holds
(`host`) and has pinned (`pinned`), those that ComfyUI has pinned (`core_pinned`), and how many `modules` and
`tensors` are alive.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from snug_path import register_snug
from tiny import use_comfyui

# Whether the dense model is loaded, the features that it is sampled with, and those that it is sampled with then.
CYCLES = [
    (False, ["casting", "offload"], ["offload"]),
    (True, ["lora", "offload"], ["casting", "lora"]),
    (False, ["compile"], ["lora"]),
    (True, ["offload", "casting", "compile"], ["lora", "compile"]),
    (False, ["offload", "lora"], []),
]
EVERY = 2 * len(CYCLES)
PR_SET_THP_DISABLE = 41
libc = ctypes.CDLL(None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("cycles", type=int)
    parser.add_argument("--leak", choices=("tensors", "slab"))
    arguments = parser.parse_args()
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # huge pages come and go as the kernel likes
    register_snug()
    use_comfyui(arguments.comfyui)
    pinned = pin_for_a_simulated_device()
    leaked: list[Any] = []
    found = []
    for number in range(1, arguments.cycles + 1):
        cycle(arguments.file, arguments.dense, *CYCLES[number % len(CYCLES)])
        leaked += leak(arguments.leak)
        if number % EVERY == 0:
            found.append({**measure(), "pinned": sum(pinned.values())})
    sys.stdout.write(json.dumps(found))


def cycle(file: Path, dense: Path, is_dense: bool, first: list[str], second: list[str]) -> None:
    import comfy.model_management
    import comfy.sd
    import torch
    from combinations import sample, with_features
    from snug.nodes.adapter.loading import load_diffusion_model

    with torch.inference_mode():  # as ComfyUI runs every node
        plain = comfy.sd.load_diffusion_model(str(dense)) if is_dense else load_diffusion_model(str(file))
        for setting, features in enumerate((first, second)):
            sample(with_features(plain, features, setting), "sd3", steps=1)
        comfy.model_management.unload_all_models()


def pin_for_a_simulated_device() -> dict[int, int]:
    """Lets models be streamed to a device that exists in time only, and pinned for it; returns pinned bytes by
    address.
    """
    import torch
    from snug.quant_backends.memory.simulated import SimulatedDevice, SimulatedTransfer

    pinned: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:
            pinned[address] = nbytes
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            del pinned[address]

    class PinningTransfer(SimulatedTransfer):
        def __init__(self) -> None:
            super().__init__(SimulatedDevice())
            self._pin_for = torch.device("cuda", 0)

    torch.cuda.cudart = Runtime  # type: ignore[assignment]
    offloading: Any = importlib.import_module("snug.nodes.adapter.offloading")
    offloading.transfer_to = lambda *_: PinningTransfer()
    return pinned


def leak(kind: str | None) -> list[Any]:
    """What a bug could keep of a cycle."""
    import torch
    from snug.quant_backends.memory.slab import HostBuffer

    return {None: [], "tensors": [torch.ones(200, 1000)], "slab": [HostBuffer(1 << 20)]}[kind]


def measure() -> dict[str, int]:
    import comfy.model_management
    import torch
    from snug.quant_backends.memory.slab import host_bytes_in_use

    gc.collect()
    libc.malloc_trim(0)
    alive = [type(item) for item in gc.get_objects()]
    return {
        "private": private_bytes(),
        "host": host_bytes_in_use(),
        "core_pinned": getattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0),
        "modules": sum(issubclass(kind, torch.nn.Module) for kind in alive),
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in alive),
    }


def private_bytes() -> int:
    """Memory that no other process has: what is mapped from files counts while it is mapped."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main()
