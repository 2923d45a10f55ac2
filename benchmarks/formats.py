"""What each quantization costs and gives: bits, error of weights and outputs, seconds and memory, beside its library.

    python benchmarks/formats.py --markdown benchmarks/results/formats.md --json benchmarks/results/formats.json

Bits per weight are those of the layers that are quantized, scales included. The error of weights is relative (L2
norms), over those of tiny Flux, SD3 and SDXL models: random numbers with the shapes of real layers. The error of
outputs is that of one step of each model, for a prompt of random numbers. Neither tells how a real model fares, but how
formats compare. Weights are decoded to bfloat16, as a model uses them. Targets that round the inputs of layers as well
run as the loaded layers do: inputs rounded, products of the codes, and the decoded weight where there are too few rows.
The static ones are calibrated with other prompts and latents than they are measured with. Layers that are kept by
default stay as they are, as do those whose rows a format cannot hold.

Seconds of the processor (on one thread: others on the machine do not change them) and memory are for one weight in
bfloat16; memory is the most that the process grew by, the result included. The library is the one that a target is
named after (ggml: the gguf package, or libgguf for the types that gguf does not write), on the same weight in the same
run; for targets that round inputs, encoding the weights alone. Needs a ComfyUI in $SNUG_COMFYUI_PATH, which
`eval "$(python scripts/bootstrap.py --print-env)"` sets.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from narrow import accept_narrow_models
from report import add_output_arguments, command_line, environment, heading, save, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from native_quantizer import AVAILABLE, native_quantizer  # noqa: E402
from snug_path import register_snug  # noqa: E402
from tiny import use_comfyui  # noqa: E402
from tiny.network import TinyNetwork  # noqa: E402

register_snug()

from snug.quant_backends.core.errors import SnugError  # noqa: E402
from snug.quant_backends.core.packed import PackedTensor  # noqa: E402
from snug.quant_backends.formats.outlier_products import WEIGHT as LLM_INT8_WEIGHT  # noqa: E402
from snug.quant_backends.formats.scaled import ScaledFormat, scaled_format  # noqa: E402
from snug.quant_backends.kernels.dequantize import dequantize_packed  # noqa: E402
from snug.quant_backends.kernels.eight_bit import PRODUCTS  # noqa: E402
from snug.quant_backends.kernels.linear import linear  # noqa: E402
from snug.quant_backends.quantization import (  # noqa: E402
    LayerInfo,
    Recipe,
    Target,
    make_recipe,
    product_targets,
    targets,
)
from snug.quant_backends.quantization.calibration import LayerStatistics  # noqa: E402
from snug.quant_backends.quantization.recording import Recorder  # noqa: E402
from snug.quant_backends.registry import BACKENDS  # noqa: E402

FAMILIES = ("flux", "sd3", "sdxl")
SEEDS = (7,)
CALIBRATION_SEEDS = (1, 2, 3, 4)
# Of the latents: in smaller ones some layers would have too few rows to have their input rounded.
LATENT = 32
WEIGHT = (1024, 2048)
# How libraries store the weights of formats whose layers round their inputs as well, where they do as we.
STORED_AS: dict[str, ScaledFormat] = {
    "product-int8-scb-6": LLM_INT8_WEIGHT,
    "product-int8-dynamic": scaled_format("int8-rows"),
    "product-float8_e4m3fn-dynamic": scaled_format("float8_e4m3fn-tensor"),
    "product-float8_e4m3fn-static": scaled_format("float8_e4m3fn-tensor"),
}
STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Of encoding WEIGHT once. seconds: of the processor; memory: bytes; error: relative, of the weight."""

    seconds: float
    memory: int
    error: float


@dataclass
class Row:
    target: str
    bits: float = 0.0
    weight_error: float = 0.0
    output_errors: dict[str, float] = field(default_factory=dict)
    own: Cost | None = None
    library: Cost | None = None
    library_name: str = ""


def calibration(model: TinyNetwork) -> dict[str, LayerStatistics]:
    """What reaches the layers for other seeds than the measured ones."""
    with Recorder(model.network) as recorder:
        model.outputs(CALIBRATION_SEEDS)
    return dict(recorder.calibration(samples=len(CALIBRATION_SEEDS)).layers)


def measure(encode: Callable[[], PackedTensor], weight: torch.Tensor) -> Cost:
    memory = _peak_growth(encode)  # which warms up as well
    start = time.process_time()
    packed = encode()
    seconds = time.process_time() - start
    return Cost(seconds, memory, _relative(dequantize_packed(packed), weight))


def encoder(target: Target, fmt: Any, weight: torch.Tensor) -> Callable[[], PackedTensor]:
    """What encodes the weight as the target does; inputs for its calibration are random numbers with some outliers."""
    calibrated = target.calibrated
    if calibrated is None:
        return lambda: target.encode(weight, fmt, None)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, weight.shape[1], generator=generator)
    inputs[:, ::256] *= 20
    layer = torch.nn.Linear(weight.shape[1], 1)
    with torch.no_grad(), Recorder(layer) as recorder:
        layer(inputs)
    (statistics,) = recorder.calibration().layers.values()
    return lambda: calibrated(weight, fmt, statistics)


def library_of(target: Target, layer: LayerInfo, weight: torch.Tensor) -> tuple[str, Cost] | None:
    """(its name, what it costs there); None where no library is installed that writes the format."""
    fmt, backend = target.format_for(layer), BACKENDS[target.backend]
    fmt = STORED_AS.get(fmt.name, fmt) if fmt is not None else None
    if fmt is None or backend.package is None:
        return None
    try:
        return backend.package, measure(lambda: backend.quantize(weight, fmt), weight)
    except SnugError:
        if target.backend != "gguf" or not AVAILABLE or not isinstance(fmt, type):
            return None
    values = weight.float()

    def encode() -> PackedTensor:
        return PackedTensor(native_quantizer(values, fmt.name).view(-1), fmt, tuple(values.shape))

    return "libgguf", measure(encode, weight)


def errors_of(model: TinyNetwork, recipes: dict[str, Recipe], rows: dict[str, Row]) -> None:
    """Puts the errors of one model into the rows; each weight is encoded once in each format."""
    exact = model.outputs(SEEDS)
    layers = [
        LayerInfo(name, tuple(weight.shape), dtype=torch.bfloat16) for name, weight in model.dense.items()
    ]
    made: dict[tuple[Any, str, str], tuple[torch.Tensor, PackedTensor]] = {}
    for name, recipe in recipes.items():
        error = size = 0.0
        nbytes = weights = 0
        for layer in layers:
            fmt, dense = recipe.format_for(layer), model.dense[layer.name]
            if fmt is None:
                continue
            key = (recipe.target.backend == "gguf" or recipe.target.encode, fmt.name, layer.name)
            if key not in made:
                packed = recipe.quantize(layer, dense)
                assert packed is not None  # fmt is not
                made[key] = dequantize_packed(packed, torch.bfloat16), packed
            rounded, packed = made[key]
            if isinstance(packed.format, PRODUCTS):
                model.put_forward(layer.name, lambda x, bias, packed=packed: linear(x, packed, bias))
            else:
                model.put(layer.name, rounded.float())
            error += (rounded.float() - dense).square().sum().item()
            size += dense.square().sum().item()
            nbytes, weights = nbytes + packed.nbytes, weights + layer.weights
        row = rows[name]
        row.output_errors[model.family] = model.error(exact, SEEDS)
        model.restore()
        share = 1 / len(FAMILIES)
        row.bits += share * 8 * nbytes / max(1, weights)
        row.weight_error += share * math.sqrt(error / size if size else 0.0)
        print(f"{model.family}: {name}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--comfyui", default=os.environ.get("SNUG_COMFYUI_PATH"), help="folder of ComfyUI")
    parser.add_argument("--only", default="", help="only targets whose names contain this")
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(comfyui=None)
    if not options.comfyui:
        parser.error("--comfyui or SNUG_COMFYUI_PATH is needed")
    use_comfyui(options.comfyui)
    torch.set_num_threads(1)
    accept_narrow_models()
    every = {**targets(), **product_targets()}
    missing = {name: target.unavailable for name, target in every.items() if target.unavailable}
    chosen = {n: t for n, t in every.items() if n not in missing and options.only in n}
    rows = {name: Row(name) for name in chosen}

    weight = torch.randn(WEIGHT, generator=torch.Generator().manual_seed(0)).bfloat16() / WEIGHT[1] ** 0.5
    layer = LayerInfo("blocks.0.mlp", WEIGHT)
    for name, target in chosen.items():
        fmt = target.format_for(layer)
        if fmt is None:
            continue
        rows[name].own = measure(encoder(target, fmt, weight), weight)
        found = library_of(target, layer, weight)
        if found is not None:
            rows[name].library_name, rows[name].library = found
        print(f"encoded: {name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for family in FAMILIES:
            model = TinyNetwork(family, Path(folder), LATENT)
            statistics = calibration(model)
            layers = [LayerInfo(n, tuple(w.shape)) for n, w in model.dense.items()]
            names = list(model.network.state_dict())
            recipes = {
                name: make_recipe(
                    target, layers, names, statistics=statistics if target.calibrated is not None else None
                )
                for name, target in chosen.items()
            }
            errors_of(model, recipes, rows)

    facts = environment("gguf", "bitsandbytes", "torchao", "optimum-quanto")
    text = f"{heading('Formats', command, facts)}\n{_table(rows)}\n\n{_explanation(missing)}\n"
    print(text)
    save(
        options,
        text,
        {
            "command": command,
            "environment": facts,
            "rows": [asdict(r) for r in rows.values()],
            "unavailable": missing,
        },
    )


def _table(rows: dict[str, Row]) -> str:
    header = ["target", "bits/weight", "error of weights", *(f"of {family}'s output" for family in FAMILIES)]
    header += ["seconds", "MB", "library", "its error / ours", "its seconds", "its MB"]
    lines = []
    for row in rows.values():
        own, other = row.own, row.library
        lines.append(
            [
                row.target,
                f"{row.bits:.2f}",
                f"{row.weight_error:.4f}",
                *(f"{row.output_errors[family]:.4f}" for family in FAMILIES),
                *((f"{own.seconds:.3f}", f"{own.memory / 2**20:.0f}") if own else ("–", "–")),
                row.library_name or "–",
                f"{other.error / own.error:.3f}" if own and other and own.error else "–",
                *((f"{other.seconds:.3f}", f"{other.memory / 2**20:.0f}") if other else ("–", "–")),
            ]
        )
    return table(header, lines)


def _explanation(missing: Mapping[str, str]) -> str:
    left_out = "".join(f"\n- {name}: {reason}" for name, reason in missing.items())
    size = 2 * math.prod(WEIGHT) / 2**20
    return (
        f"Seconds of the processor, MB and the ratio of errors are of one weight of {WEIGHT[0]} x {WEIGHT[1]} "
        f"({size:.0f} MB in bfloat16); the rest is of the linear layers of tiny models that are quantized by default, "
        "decoded to bfloat16. For mixes (_S, _M, _L) they are those of the format that the mix gives to this weight. "
        "INT8 and FP8 dynamic and static and LLM.int8 round the inputs of layers as well: their errors of outputs have "
        f"both in them.\n\nTargets that cannot be chosen here:\n{left_out}"
    )


def _relative(found: torch.Tensor, weight: torch.Tensor) -> float:
    return ((found - weight.float()).norm() / weight.float().norm()).item()


def _peak_growth(function: Callable[[], Any]) -> int:
    """Bytes that the process's own memory grew by at most; 0 where the system does not say."""
    if not STATUS.exists():
        return 0
    gc.collect()
    _give_back_memory()
    before, peak, done = _own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
        peak = max(peak, _own_memory())
    finally:  # a library that cannot write a format must not leave the thread behind
        done.set()
        thread.join()
    del result
    return max(0, peak - before)


def _give_back_memory() -> None:
    """What was freed but is kept by the allocator would hide what is allocated next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _own_memory() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
