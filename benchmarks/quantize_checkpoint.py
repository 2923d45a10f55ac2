"""Quantizing a checkpoint to a GGUF file: Snug beside the gguf package, speed and peak memory.

    python benchmarks/quantize_checkpoint.py --gib 4 --types Q8_0 \
        --markdown benchmarks/results/quantize-checkpoint.md --json benchmarks/results/quantize-checkpoint.json

The checkpoint is made first and deleted after: bfloat16 matrices of 32 MiB to 128 MiB with normal weights, named like
those of Wan. Each contender is a process of its own that reads it as a mapped file, quantizes matrix by matrix and
writes the GGUF file as it goes. Memory is the private memory of that process (RssAnon of Linux, sampled every 5 ms)
above what it had before the first tensor; pages of mapped files are not counted. The tensors of the files must be equal
byte for byte. MB/s are of the bfloat16 file, by the clock and by processor time (for machines that do other work
meanwhile).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug

register_snug()
from snug.quant_backends.formats import FORMATS  # noqa: E402
from snug.quant_backends.readers.safetensors_file import SafetensorsFile  # noqa: E402
from snug.quant_backends.writers import write_gguf  # noqa: E402

SHAPES = ((4096, 4096), (8192, 4096), (4096, 16384), (8192, 4096))
PATTERN_WEIGHTS = 1 << 24  # random weights, repeated: their values matter, not that they differ


def make_checkpoint(path: Path, nbytes: int) -> None:
    """A safetensors file of about so many bytes."""
    header: dict[str, Any] = {}
    done = 0
    while done < nbytes:
        shape = SHAPES[len(header) % len(SHAPES)]
        size = shape[0] * shape[1] * 2
        name = f"blocks.{len(header)}.ffn.0.weight"
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [done, done + size]}
        done += size
    content = json.dumps(header).encode()
    content = content.ljust(-(-len(content) // 8) * 8)
    pattern = (torch.randn(PATTERN_WEIGHTS, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    data = pattern.view(torch.uint8).numpy().data
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        while done:
            done -= file.write(data[: min(done, len(data))])


def with_snug(source: Path, target: Path, name: str) -> None:
    file = SafetensorsFile(source)

    class Tensors(dict[str, None]):
        def __getitem__(self, key: str) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return file.read(key)

    write_gguf(target, Tensors.fromkeys(file.tensors), name, architecture="wan")  # pyright: ignore[reportArgumentType]


def with_gguf(source: Path, target: Path, name: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    file = SafetensorsFile(source)
    writer = gguf.GGUFWriter(target, "wan")
    for key, stored in file.tensors.items():
        nbytes = FORMATS[name].nbytes(stored.shape)
        writer.add_tensor_info(key, stored.shape, None, nbytes, kind)  # pyright: ignore[reportArgumentType]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key in file.tensors:
        writer.write_tensor_data(gguf.quants.quantize(file.read(key).float().numpy(), kind))
    writer.close()


CONTENDERS: dict[str, Callable[[Path, Path, str], None]] = {"Snug": with_snug, "gguf": with_gguf}


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("Memory is measured on Linux only")


def measured(contender: str, source: Path, target: Path, name: str) -> dict[str, float]:
    """Runs in a process of its own."""
    tiny = target.with_name("tiny.safetensors")
    make_checkpoint(tiny, 1)
    CONTENDERS[contender](tiny, target, name)  # imports, tables
    before = most = private_bytes()
    stop = threading.Event()

    def sample() -> None:
        nonlocal most
        while not stop.wait(0.005):
            most = max(most, private_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    wall, processor = time.perf_counter(), time.process_time()
    CONTENDERS[contender](source, target, name)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    stop.set()
    thread.join()
    return {"seconds": wall, "processor_seconds": processor, "peak_bytes": most - before}


def data_of(path: Path) -> bytes:
    """A digest of the tensors' bytes."""
    import hashlib

    import gguf

    digest = hashlib.sha256()
    for tensor in gguf.GGUFReader(path).tensors:
        digest.update(tensor.name.encode() + tensor.data.tobytes())
    return digest.digest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--types", nargs="+", default=["Q8_0"], choices=FORMATS, metavar="TYPE")
    parser.add_argument("--folder", help="where to put the files, default: that for temporary ones")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        contender, source, target, name = arguments.measure
        print(json.dumps(measured(contender, Path(source), Path(target), name)))
        return

    rows, records = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "model.safetensors"
        make_checkpoint(source, int(arguments.gib * 2**30))
        largest = max(rows_ * columns * 2 for rows_, columns in SHAPES)
        for name in arguments.types:
            digests = set()
            for contender in CONTENDERS:
                target = Path(folder) / "model.gguf"
                command = [sys.executable, __file__, "--measure", contender, source, target, name]
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                digests.add(data_of(target))
                megabytes = source.stat().st_size / 1e6
                records.append({"type": name, "contender": contender, **result})
                speeds = [megabytes / result[key] for key in ("seconds", "processor_seconds")]
                peak = result["peak_bytes"]
                cells = [f"{result['seconds']:.1f}", *(f"{speed:.0f}" for speed in speeds)]
                rows.append([f"{name}, {contender}", *cells, f"{peak / 2**20:.0f}", f"{peak / largest:.2f}"])
                print(rows[-1], flush=True)
            if len(digests) != 1:
                raise SystemExit(f"{name}: the files differ, so the table would compare different things")
    command = command_line(folder=None)
    facts = environment("gguf")
    header = ("type", "seconds", "MB/s", "MB/s of processor time", "peak MiB", "peak / largest tensor")
    text = heading(f"Quantizing a checkpoint of {arguments.gib:g} GiB", command, facts)
    text += "\n" + table(header, rows) + "\n"
    save(arguments, text, {"command": command, "environment": facts, "results": records})
    print(text)


if __name__ == "__main__":
    main()
