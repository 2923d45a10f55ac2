"""ggml's own decoders for CPUs, from the package libgguf where it is installed: up to five times as fast as torch.

The package is a few hundred kilobytes of C with wheels for the usual systems, so nothing is compiled here. It decodes
on the thread that calls and lets Python's lock go meanwhile, so that a few threads share one tensor.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from ..formats import Format
from .threads import workers

PACKAGE = "libgguf"
# The types whose C code is at least a fifth faster than torch's vector operations (benchmarks/dequantize.py).
FASTER = frozenset(
    [
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0"),
    ]
)
# Weights that are worth handing to another thread: it takes some 30 microseconds to wake, as long as decoding these.
PART = 1 << 17
# Blocks that are decoded by both ways before a type is trusted.
SAMPLE = 64

# uint8 [n, block_bytes] to float32 [n, block_size], both contiguous and on the CPU.
Decoder = Callable[[torch.Tensor, torch.Tensor], None]

_wanted = True


def native_decoder(fmt: type[Format], blocks: torch.Tensor) -> Decoder | None:
    """What decodes such blocks into a plain CPU tensor faster than `Format.decode`, to the same bits; None: nothing."""
    if (
        fmt.name not in FASTER
        or not _wanted
        or blocks.device.type != "cpu"
        or type(blocks) is not torch.Tensor
    ):
        return None
    return _checked_decoder(fmt)


def unavailable() -> str | None:
    """Why weights are decoded by torch alone and what to do, in one sentence; None when the package is there."""
    if _library() is not None:
        return None
    return (
        f"GGUF weights that are used on the CPU are decoded by torch; `pip install {PACKAGE}` makes that up to five "
        f"times as fast."
    )


@contextmanager
def torch_only() -> Iterator[None]:
    """Nothing is decoded natively meanwhile, in any thread: for comparing the two ways."""
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


@lru_cache
def _library() -> Any:
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return importlib.import_module(PACKAGE)
    except Exception:  # built for another Python or numpy: as good as missing
        return None


@lru_cache
def _checked_decoder(fmt: type[Format]) -> Decoder | None:
    """The library's decoder, if on this machine it gives the same bits as `Format.decode`.

    Compilers for some processors (ARM) fuse a product and a sum, which rounds once where the definition rounds twice.
    """
    library = _library()
    if library is None:
        return None

    def decode(blocks: torch.Tensor, out: torch.Tensor) -> None:
        _in_parts(library.dequantize_rows_into_raw, fmt, blocks, out)

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (SAMPLE, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    expected, found = fmt.dequantize_blocks(blocks), torch.empty(SAMPLE, fmt.block_size)
    try:
        decode(blocks, found)
    except (ValueError, TypeError, AttributeError):  # another version of the package
        return None
    same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
    return decode if same.all() else None


def _in_parts(
    decode_rows: Callable[..., int], fmt: type[Format], blocks: torch.Tensor, out: torch.Tensor
) -> None:
    """Each thread decodes as many blocks; this one the last of them."""
    source, target, count = blocks.numpy(), out.numpy(), len(blocks)
    parts = max(1, min(torch.get_num_threads(), count * fmt.block_size // PART))
    step = -(-count // parts)

    def decode(start: int) -> None:
        stop = min(start + step, count)
        weights = (stop - start) * fmt.block_size
        decode_rows(fmt.ggml_type, source[start:stop], target[start:stop], 1, weights)

    *others, last = range(0, count, step)
    if not others:
        decode(last)
        return
    running = [workers().submit(decode, start) for start in others]
    try:
        decode(last)
    finally:
        wait(running)
    for each in running:
        each.result()
