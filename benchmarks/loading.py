"""How fast weights come out of a file: into the slab of group offloading, and into what a CPU calculates with.

    python benchmarks/loading.py --markdown benchmarks/results/loading-cpu.md --json benchmarks/results/loading-cpu.json

Run it with the Python that ComfyUI runs with, and SNUG_COMFYUI_PATH set (`scripts/bootstrap.py --print-env`), on Linux.

The file is a Flux with its real layers, made in a temporary folder. Contenders take turns, the best round counts. Cold:
the system has dropped the file from its cache. Raw reading is one, and four threads, that read the whole file in pieces
of 16 MiB into memory that was used before: what the disk and the system can do. "Slab" fills memory, too, group by
group as offloading does; "touched" asks for one byte of each page of the mapped file, as calculating on a CPU does.
On a GPU, too: "plain to the GPU" copies one mapped tensor after the other there, as torch does; "staged to the GPU"
through pinned buffers, as loading does; "slab to the GPU" is the slab, filled, pinned and copied; "link" is a copy from
memory that is pinned already. What can be reached is the slower of reading and the link.
"""

from __future__ import annotations

import argparse
import importlib
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from large_files import GGUF_KINDS, file_name, make_file
from snug_path import register_snug
from tiny import use_comfyui

TITLE = "Speed of loading"
LIMIT = 0.8  # of raw reading, at least
PIECE = 16 << 20
GROUP = 128 << 20
RAW = ("raw, 1 thread", "raw, 4 threads")
SLAB, TOUCHED, LINK = "slab", "touched", "link"
PLAIN, STAGED, SLAB_TO_GPU = "plain to the GPU", "staged to the GPU", "slab to the GPU"
GPU_WAYS = (PLAIN, STAGED, SLAB_TO_GPU)


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(path: Path, memory: torch.Tensor, threads: int) -> None:
    array: Any = memory.numpy()
    target = memoryview(array)
    with path.open("rb") as file, ThreadPoolExecutor(threads) as pool:

        def read(start: int) -> None:
            stop = min(start + PIECE, memory.numel())
            while start < stop:
                start += os.preadv(file.fileno(), [target[start:stop]], start)

        list(pool.map(read, range(0, memory.numel(), PIECE)))


def tensors_of(path: Path) -> list[torch.Tensor]:
    """The mapped weights, as the loader finds them."""
    readers = importlib.import_module("snug.quant_backends.readers")
    packed = importlib.import_module("snug.quant_backends.core.packed").PackedTensor
    found = readers.load_diffusion_gguf(path).state_dict.values()
    return [value.data if isinstance(value, packed) else value for value in found]


def fill_slab(path: Path, memory: torch.Tensor) -> None:
    """Through the layout of a plan with groups of GROUP bytes."""
    plans = importlib.import_module("snug.quant_backends.memory.plan")
    slabs = importlib.import_module("snug.quant_backends.memory.slab")
    blocks: list[list[torch.Tensor]] = [[]]
    for tensor in tensors_of(path):
        if sum(each.nbytes for each in blocks[-1]) > GROUP:
            blocks.append([])
        blocks[-1].append(tensor)
    sizes = [
        plans.Block(str(index), tuple(tensor.nbytes for tensor in block))
        for index, block in enumerate(blocks)
    ]
    plan = plans.make_plan(sizes, limit=2 * max(block.nbytes for block in sizes))  # two slots, no more
    layout = slabs.GroupLayout(plan, lambda block: blocks[block])
    for number, group in enumerate(plan.groups):
        layout.fill(number, memory.narrow(0, group.offset, group.nbytes))


def touch(path: Path) -> None:
    for tensor in tensors_of(path):
        tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def slab_to_gpu(path: Path, memory: torch.Tensor, device: torch.device) -> None:
    fill_slab(path, memory)
    slabs = importlib.import_module("snug.quant_backends.memory.slab")
    slab = slabs.HostBuffer(memory.numel(), device, existing=memory)
    memory.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    slab.close()


def to_gpu(path: Path, device: torch.device, through_buffers: bool) -> None:
    """All weights are on the device together at the end, as after loading."""
    staging = importlib.import_module("snug.quant_backends.memory.staging")
    with staging.staged_copies(device if through_buffers else None):
        there = [staging.staged(tensor, device) for tensor in tensors_of(path)]
    torch.cuda.synchronize(device)
    del there


def on_gpu(path: Path, memory: torch.Tensor, device: torch.device) -> dict[str, Callable[[], Any]]:
    pinned = torch.empty(memory.numel(), dtype=torch.uint8, pin_memory=True)
    return {
        PLAIN: lambda: to_gpu(path, device, False),
        STAGED: lambda: to_gpu(path, device, True),
        SLAB_TO_GPU: lambda: slab_to_gpu(path, memory, device),
        LINK: lambda: (pinned.to(device, non_blocking=True), torch.cuda.synchronize(device)),
    }


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    started, worked = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - worked


def measure(path: Path, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """After each round one record per way and state of the cache: GB/s at best so far, and processor seconds per GB."""
    memory = torch.ones(path.stat().st_size + PIECE, dtype=torch.uint8)  # alignment of tensors takes a little
    file_bytes = memory[: path.stat().st_size]
    runs: dict[str, Callable[[], Any]] = {
        RAW[0]: lambda: read_raw(path, file_bytes, 1),
        RAW[1]: lambda: read_raw(path, file_bytes, 4),
        SLAB: lambda: fill_slab(path, memory),
        TOUCHED: lambda: touch(path),
    }
    if torch.cuda.is_available():
        runs |= on_gpu(path, memory, torch.device("cuda", torch.cuda.current_device()))
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    nbytes = path.stat().st_size
    for _ in range(rounds):
        for name, run in runs.items():
            for cold in (True, False):
                if cold:
                    drop_from_cache(path)
                found.setdefault((name, cold), []).append(seconds(run))
        yield [
            {
                "way": name,
                "cold": cold,
                "rate": nbytes / min(wall for wall, _ in times) / 1e9,
                "processor": min(work for _, work in times) / nbytes * 1e9,
            }
            for (name, cold), times in found.items()
        ]


def as_markdown(kind: str, nbytes: int, records: list[dict[str, Any]]) -> str:
    rates = {(record["way"], record["cold"]): record for record in records}
    rows = []
    for way in dict.fromkeys(record["way"] for record in records):
        row = [way]
        for cold in (True, False):
            record, raw = rates[way, cold], max(rates[name, cold]["rate"] for name in RAW)
            if way in GPU_WAYS:
                raw = min(raw, rates[LINK, cold]["rate"])
            row += [f"{record['rate']:.2f}", f"{record['rate'] / raw:.2f}", f"{record['processor']:.2f}"]
        rows.append(row)
    header = ["way"]
    for state in ("cold", "warm"):
        header += [f"{state} GB/s", f"{state} / reachable", f"{state} processor s/GB"]
    return f"### {kind}, {nbytes / 1e9:.2f} GB\n\n{table(header, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file in GiB")
    parser.add_argument("--kind", choices=GGUF_KINDS, default="Q4_K")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's threads, which copy; default: torch's own")
    parser.add_argument("--files", type=Path, help="where the temporary folder is made")
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(files=None)
    comfyui = os.environ.get("SNUG_COMFYUI_PATH")
    if not comfyui:
        raise SystemExit(
            'SNUG_COMFYUI_PATH is not set: export what "scripts/bootstrap.py --print-env" prints'
        )
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("this benchmark drops files from the system's cache as Linux allows it")
    use_comfyui(comfyui)
    register_snug()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = {**environment(), "threads": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory(dir=options.files) as folder:
        path = Path(folder, file_name(options.kind))
        make_file(path, options.kind, int(options.gib * (1 << 30)))
        nbytes, text = path.stat().st_size, ""
        result = {"command": command, "environment": facts, "limit": LIMIT, "file_bytes": nbytes}
        for records in measure(path, options.rounds):
            text = heading(TITLE, command, facts) + "\n" + as_markdown(options.kind, nbytes, records)
            save(options, text, {**result, "records": records})
    print(text)


if __name__ == "__main__":
    main()
