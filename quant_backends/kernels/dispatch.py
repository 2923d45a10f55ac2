"""Which implementation decodes and multiplies a packed weight: the only place that picks.

"torch" can do everything everywhere. "triton" states here what it needs. The first that can is taken; `using` forces
one, for tests and benchmarks. A kernel that cannot be started (no compiler for its launcher, a driver that is too old)
or whose first result is not torch's is not tried again, and torch does its work.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from ..core.device import compute_capability, interprets_kernels, records_graph, triton_version
from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats import FORMATS
from .gpu import operands

log = logging.getLogger("snug")

AUTO, TRITON, TORCH = "auto", "triton", "torch"


@dataclass(frozen=True, slots=True)
class Requirements:
    """capability: least of the GPU; triton: least version; dtypes: of results.

    most_tokens: rows of x up to which multiplying from packed weights pays, by the GPU's capability: above, decoding
    the whole weight for the library's matmul does. Of other GPUs they are `other_tokens`.
    """

    capability: tuple[int, int]
    triton: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    most_tokens: dict[tuple[int, int], int]
    other_tokens: int


TRITON_NEEDS = Requirements(
    # The first generation with instructions for bfloat16.
    capability=(8, 0),
    # The oldest that the kernels have been compiled with (of torch 2.7).
    triton=(3, 3),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    # A100, RTX 30, RTX 40, H100, B200, RTX 50.
    most_tokens={(8, 0): 128, (8, 6): 128, (8, 9): 256, (9, 0): 64, (10, 0): 64, (12, 0): 256},
    other_tokens=8,
)

# Older ones make hundreds of thousands of instructions of the kernel that rounds to 8 bits, which take minutes to
# compile.
ROUNDING_TRITON = (3, 9)

_forced = AUTO
Rounded = tuple[torch.Tensor, torch.Tensor]
# Kernels that round to 8 bits are called so, and those for inputs of layers.
_ROUND, _TOKENS = "round", "rounding inputs to 8 bits"
_PLAIN = {FORMATS[name].dtype: FORMATS[name] for name in ("F32", "F16", "BF16")}
# Up to which scales rows are finite, and the part of their codes that may be one step away from torch's.
_LARGEST_USUAL, _FEW = 1e30, 1e-4
# Kernels by what they are for: those that are not to be used, and those whose first result was right.
_fails: set[tuple[object, ...]] = set()
_proven: set[tuple[object, ...]] = set()
# How far a result may be from that of float32, relative to it: weights and result are rounded to 16 bits, and torch may
# have been told to round float32 to TF32.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Within it everything is done by "triton" or "torch"; SnugError from a call where that cannot."""
    global _forced
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


@functools.lru_cache(maxsize=256)
def _missing(device: torch.device) -> str | None:
    """What keeps Triton's kernels from running on a device; None where nothing does."""
    needs = TRITON_NEEDS
    on_cpu = device.type == "cpu" and interprets_kernels()
    if not on_cpu and compute_capability(device) < needs.capability:
        return f"{device} is no NVIDIA GPU of compute capability {needs.capability[0]}.{needs.capability[1]} or newer"
    if triton_version() < needs.triton:
        return f"there is no Triton {needs.triton[0]}.{needs.triton[1]} or newer"
    return None


def _torch_does(device: torch.device) -> bool:
    """Whether there is no need to ask; a compiler that traces into this would stumble over pointers."""
    return _forced == TORCH or (_forced == AUTO and device.type == "cpu") or torch.compiler.is_compiling()


def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module that starts the kernels, where they can be used."""
    if _torch_does(device):
        return None
    missing = _missing(device)
    if missing is None and dtype not in TRITON_NEEDS.dtypes:
        missing = f"their results cannot be {dtype}"
    if missing is None:
        return _launch_module()
    if _forced == TRITON:
        raise SnugError(f"Triton's kernels cannot be used: {missing}.")
    return None


def _rounding_kernels(device: torch.device) -> ModuleType | None:
    """The same for the kernel that rounds to 8 bits."""
    compiles = interprets_kernels() or triton_version() >= ROUNDING_TRITON
    return _kernels(device, torch.float32) if compiles else None


@functools.cache
def _launch_module() -> ModuleType:
    from .gpu import launch

    return launch


def _attempt(key: tuple[object, ...], start: Callable[[], None], agrees: Callable[[], bool | None]) -> bool:
    """Whether `start` has started kernels. What has failed once is not tried again.

    agrees: whether their result is torch's, None where there is no saying; asked for each key until it says one of
    both: compilers and drivers differ from those that the kernels were tested with, and a wrong weight would be seen as
    noise at best.
    """
    if key in _fails:
        return False
    try:
        start()
        if key in _proven or _forced == TRITON or records_graph():
            return True
        right = _asked(agrees)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if _forced == TRITON:
            raise
        reason = str(error).strip().partition("\n")[0]
        _give_up(key, "could not be started", f" ({type(error).__name__}: {reason})")
        return False
    if right is False:
        _give_up(key, "gave another result than torch", "")
        return False
    if right:
        _proven.add(key)
    return True


def _asked(agrees: Callable[[], bool | None]) -> bool | None:
    """What `agrees` says; None where there is no memory to find out."""
    try:
        with using(TORCH):
            return agrees()
    except torch.OutOfMemoryError:
        return None


def _give_up(key: tuple[object, ...], what: str, details: str) -> None:
    _fails.add(key)
    log.warning(
        "Snug: a GPU kernel for %s %s, so torch does its work: the right result, more slowly%s. Updating Triton and "
        "the GPU's driver may help.",
        key[1],
        what,
        details,
    )


def _same_weight(found: torch.Tensor, packed: PackedTensor) -> bool:
    from .dequantize import dequantize_packed  # which asks this module

    expected = dequantize_packed(packed, found.dtype)
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool | None:
    """Whether a result is the expected one, in float32, but for rounding; None where that tells nothing.

    Only finite numbers do, and zeros alone, which wrong code gives as well, do not.
    """
    finite = expected.to(found.dtype).isfinite()
    if not bool((finite & (expected != 0)).any()):
        return None
    difference = torch.where(finite, found.float() - expected, 0.0).norm()
    # Where the kernel's is no number, neither is the difference, which is not less than anything then.
    return bool(difference <= _TOLERANCE[found.dtype] * torch.where(finite, expected, 0.0).norm())


def _same_rounding(
    codes: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor, expected_scales: torch.Tensor
) -> bool | None:
    """Whether rows were rounded alike, where they are finite: to the same codes but for a few at a border of two.

    None where nothing but zeros is finite.
    """
    usual = expected_scales < _LARGEST_USUAL
    if not bool(((expected.view(torch.int8) != 0) & usual.view(-1, 1)).any()):
        return None
    if not bool((((scales - expected_scales).abs() <= 1e-6 * expected_scales) | ~usual).all()):
        return False
    difference = codes.view(torch.int8).to(torch.int16) - expected.view(torch.int8).to(torch.int16)
    difference = difference.abs_().mul_(usual.view(-1, 1))
    return bool((difference <= 1).all()) and bool(difference.float().mean() <= _FEW)


def _cannot(packed: PackedTensor) -> None:
    if _forced == TRITON:
        raise SnugError(
            f"There is no kernel for a {packed.format.name} weight of shape {tuple(packed.shape)}."
        )


def decode_by_kernel(packed: PackedTensor, out: torch.Tensor) -> bool:
    """Decode into `out` (contiguous, of packed's shape and on its device) where a kernel can; whether it did."""
    launch = _kernels(out.device, out.dtype)
    if launch is None:
        return False
    found = operands.flat_constants(packed.format, tuple(packed.shape))
    tensors = None if found is None else operands.tensors(packed, found)
    if found is None or tensors is None:
        _cannot(packed)
        return False
    key = ("dequantize", packed.format.name, out.dtype, out.device, tensors[0].dtype)
    return _attempt(key, lambda: launch.dequantize(found, tensors, out), lambda: _same_weight(out, packed))


def merges_by_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` get low-rank changes as they are decoded on `device`."""
    return _kernels(device, dtype) is not None


def decode_changed_by_kernel(
    packed: PackedTensor, down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """The weight [rows, columns] plus up [rows, rank] @ down [rank, columns], in `dtype`; None where no kernel can.

    up and down: on the weight's device, of one type.
    """
    device = packed.data.device
    launch = _kernels(device, dtype)
    if launch is None:
        return None
    found = operands.constants(packed.format, tuple(packed.shape))
    tensors = None if found is None else operands.tensors(packed, found)
    if found is None or tensors is None or up.shape[1] % 16 or up.dtype not in TRITON_NEEDS.dtypes:
        _cannot(packed)
        return None
    out = torch.empty(packed.shape, dtype=dtype, device=device)
    up, down = up.contiguous(), down.contiguous()
    key = ("dequantize with a LoRA", packed.format.name, dtype, up.dtype, device)

    def agrees() -> bool | None:
        from .dequantize import dequantize_packed

        expected = dequantize_packed(packed).addmm_(up.float(), down.float())
        return _close(out, expected)

    done = _attempt(key, lambda: launch.dequantize_changed(found, tensors, up, down, out), agrees)
    return out if done else None


def rounds_by_kernel(packed: PackedTensor, device: torch.device) -> bool:
    """Whether the rows of a weight like this one are rounded to 8 bits in one pass on `device`, as far as is known."""
    if _rounding_kernels(device) is None:
        return False
    is_out = any(key[:2] == (_ROUND, packed.format.name) for key in _fails)
    return not is_out and operands.rounding_constants(packed.format, tuple(packed.shape)) is not None


def round_weight_by_kernel(packed: PackedTensor, stored: str, width: int) -> Rounded | None:
    """(codes, `stored` [rows, columns]; scales, float32 [rows]) of a weight; None where no kernel can.

    stored: "int8" or "float8_e4m3fn"; width: of the groups of columns that are rotated first, 1 for none. The result is
    that of `rounding.exactly_rounded`.
    """
    if _rounding_kernels(packed.data.device) is None:
        return None
    found = operands.rounding_constants(packed.format, tuple(packed.shape))
    tensors = None if found is None else operands.tensors(packed, found)
    if found is None or tensors is None:
        return None
    return _rounded(packed.format.name, found, tensors, stored, width, lambda: packed)


def round_tokens_by_kernel(rows: torch.Tensor, stored: str, width: int) -> Rounded | None:
    """The same of rows [m, k] of float32, float16 or bfloat16. Infinities make the scale of their row infinite."""
    fmt = _PLAIN.get(rows.dtype)
    if fmt is None or _rounding_kernels(rows.device) is None:
        return None
    found = operands.rounding_constants(fmt, tuple(rows.shape))
    if found is None:
        return None
    rows = rows.contiguous()

    def source() -> PackedTensor:
        return PackedTensor(rows.view(-1).view(torch.uint8), fmt, tuple(rows.shape))

    return _rounded(_TOKENS, found, (rows,) * 6, stored, width, source)


def _rounded(
    name: str,
    found: operands.Constants,
    tensors: tuple[torch.Tensor, ...],
    stored: str,
    width: int,
    source: Callable[[], PackedTensor],
) -> Rounded | None:
    """source: what is rounded, for the comparison."""
    device, launch = tensors[0].device, _launch_module()
    codes = torch.empty((found.rows, found.columns), dtype=getattr(torch, stored), device=device)
    scales = torch.empty(found.rows, dtype=torch.float32, device=device)

    def start() -> None:
        launch.round_to_8_bits(found, tensors, codes, scales, width, bounded=name != _TOKENS)

    def agrees() -> bool | None:
        from .rounding import exactly_rounded

        return _same_rounding(codes, scales, *exactly_rounded(source(), stored, width))

    key = (_ROUND, name, found.columns, stored, width, device, tensors[0].dtype)
    return (codes, scales) if _attempt(key, start, agrees) else None


def linear_by_kernel(x: torch.Tensor, packed: PackedTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [..., in] @ weight.T + bias from the packed weight, for few rows of x; None where it does not pay or go."""
    if _torch_does(x.device):
        return None
    columns = x.shape[-1]
    tokens = x.numel() // columns if columns else 0
    if not 0 < tokens <= most_tokens(x.device, x.dtype):
        return None
    launch = _kernels(x.device, x.dtype)
    if launch is None:
        return None
    found = operands.constants(packed.format, tuple(packed.shape))
    tensors = None if found is None else operands.tensors(packed, found)
    if found is None or tensors is None:
        return None
    rows = x.reshape(tokens, columns).contiguous()
    output = torch.empty((tokens, found.rows), dtype=x.dtype, device=x.device)
    added = None if bias is None else bias.contiguous()
    few = tokens <= operands.MOST_VECTORS
    key = ("linear", packed.format.name, x.dtype, x.device, tensors[0].dtype, few)

    def agrees() -> bool | None:
        from .dequantize import dequantize_packed

        # In float32: users may have chosen sums in 16 bits for speed, which are further off than the kernel.
        weight = dequantize_packed(packed, rows.dtype).float()
        return _close(output, F.linear(rows.float(), weight, None if added is None else added.float()))

    if not _attempt(key, lambda: launch.linear(found, tensors, rows, added, output), agrees):
        return None
    return output.view(*x.shape[:-1], found.rows)


@functools.lru_cache(maxsize=256)
def most_tokens(device: torch.device, dtype: torch.dtype) -> int:
    """Rows of x up to which a packed weight is multiplied as it is."""
    needs = TRITON_NEEDS
    if dtype == torch.float32:  # matrix units would round it
        return operands.MOST_VECTORS
    if device.type == "cpu":  # the interpreter, for tests
        return max(needs.most_tokens.values())
    return needs.most_tokens.get(compute_capability(device), needs.other_tokens)
