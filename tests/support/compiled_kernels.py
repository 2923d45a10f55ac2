"""The GPU kernels as Triton compiles them for a GPU that need not be there: their instructions and what they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.gpu import launch, operands
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = (
    "dequantize_blocks",
    "dequantize_tiles",
    "vectors_product",
    "matrix_product",
    "combine",
    "round_rows",
)
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments that it was to be started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Code:
    """weights: decoded by a thread in one go; per_weight: instructions of PTX, in the loop if there is one.

    loads, stores: instructions that reach global memory, by width in bytes; shared: bytes; registers and spilled (bytes
    of local memory) for each thread, None where the tool that tells is missing.
    """

    ptx: str
    weights: float
    per_weight: float
    loads: dict[int, int]
    stores: dict[int, int]
    shared: int
    registers: int | None
    spilled: int | None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it kernels are not started but noted down."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **constants: found.append(
                Launch(self.kernel, grid, arguments, constants)
            )

    kernels = {name: getattr(launch, name) for name in KERNELS}
    try:
        for name, kernel in kernels.items():
            setattr(launch, name, Recorder(kernel))
        yield found
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)


def decoding_launch(packed: PackedTensor, dtype: torch.dtype, rank: int = 0) -> Launch:
    """How the weight is decoded; with a LoRA of this rank."""
    find = operands.constants if rank else operands.flat_constants
    constants = find(packed.format, tuple(packed.shape))
    assert constants is not None
    tensors = operands.tensors(packed, constants)
    assert tensors is not None
    out = torch.empty(packed.shape, dtype=dtype)
    with recorded() as launches:
        if rank:
            up, down = out.new_empty(packed.shape[0], rank), out.new_empty(rank, packed.shape[1])
            launch.dequantize_changed(constants, tensors, up, down, out)
        else:
            launch.dequantize(constants, tensors, out)
    return launches[0]


def product_launches(packed: PackedTensor, tokens: int, dtype: torch.dtype) -> list[Launch]:
    """How `tokens` rows are multiplied: the product and, if columns are divided, the sum."""
    constants = operands.constants(packed.format, tuple(packed.shape))
    assert constants is not None
    tensors = operands.tensors(packed, constants)
    assert tensors is not None
    rows, columns = packed.shape
    x, bias = torch.empty(tokens, columns, dtype=dtype), torch.empty(rows, dtype=dtype)
    with recorded() as launches:
        launch.linear(constants, tensors, x, bias, x.new_empty(tokens, rows))
    return launches


def rounding_launch(packed: PackedTensor, stored: str, width: int) -> Launch:
    """How the weight's rows are rounded to `stored`, in groups of `width` columns rotated."""
    constants = operands.rounding_constants(packed.format, tuple(packed.shape))
    assert constants is not None
    tensors = operands.tensors(packed, constants)
    assert tensors is not None
    codes = torch.empty(packed.shape, dtype=getattr(torch, stored))
    with recorded() as launches:
        launch.round_to_8_bits(constants, tensors, codes, torch.empty(len(codes)), width, bounded=True)
    return launches[0]


def compiled(launched: Launch, capability: int) -> Code:
    """What Triton makes of it for a GPU of compute capability `capability`, such as 90, by aligned pointers."""
    constants = dict(launched.constants)
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = list(launched.arguments)
    for place, name in enumerate(launched.kernel.arg_names):
        value = given[place] if place < len(given) else None
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value is None or value == 1:  # as Triton treats a 1
            signature[name], values[(place,)] = "constexpr", constants[name] if value is None else 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launched.kernel, signature, values, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _code(result, launched.constants)


def _code(result: Any, constants: dict[str, Any]) -> Code:
    ptx = result.asm["ptx"]
    body = _loop(ptx) or ptx.splitlines()
    opcodes = Counter(opcode for line in body if (opcode := _opcode(line)))
    columns = constants.get("COLUMNS", constants.get("SIZE", 0)) + constants.get("REST", 0)
    weights = constants["ROWS"] * columns / (32 * result.metadata.num_warps)
    registers, spilled = _resources(result.asm["cubin"])
    loads = _widths(opcodes, "ld.global") + _widths(opcodes, "cp.async")
    return Code(
        ptx,
        weights,
        sum(opcodes.values()) / weights,
        dict(loads),
        dict(_widths(opcodes, "st.global")),
        result.metadata.shared,
        registers,
        spilled,
    )


def _opcode(line: str) -> str | None:
    line = re.sub(r"^@!?%p\d+\s+", "", line.strip())
    if not line.endswith(";") or line.startswith((".", "//", "(", ")", "{", "}")):
        return None
    return line.split()[0].rstrip(";")


def _loop(ptx: str) -> list[str]:
    """The lines of the longest loop; none where there is no jump backwards."""
    lines = ptx.splitlines()
    labels = {
        line.strip().partition(":")[0]: place
        for place, line in enumerate(lines)
        if re.match(r"\s*\$\S+:", line)
    }
    longest: list[str] = []
    for place, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if target and labels.get(target[1], place) < place and place - labels[target[1]] > len(longest):
            longest = lines[labels[target[1]] : place + 1]
    return longest


def _widths(opcodes: Counter[str], kind: str) -> Counter[int]:
    """Instructions by bytes of an access."""
    found: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        if not opcode.startswith(kind) or "group" in opcode:
            continue
        vector = re.search(r"\.v(\d)", opcode)
        bits = re.search(r"\.[bsuf](\d+)", opcode)
        if bits is None:  # cp.async: of 16 bytes past the first cache, else less
            found[16 if ".cg." in opcode else 4] += count
        else:
            found[int(bits[1]) // 8 * (int(vector[1]) if vector else 1)] += count
    return found


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (None, None)
