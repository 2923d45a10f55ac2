"""Packed bytes to weights and back: by a GPU's kernel where `dispatch` finds one, else with torch.

Weights are decoded in float32, whatever the output, and rounded once. Work goes chunk by chunk, so that the
intermediate values stay in the processor's cache and scratch memory stays small for any tensor size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..core.errors import SnugError
from ..core.host_memory import empty
from ..core.packed import PackedTensor
from ..formats import Format, Scratch
from ..formats.row_encoder import DATA, RowEncoder, Tensors
from ..formats.scaled_base import ScaledFormat, rows_and_columns
from .dispatch import decode_by_kernel
from .native import native_decoder
from .threads import share

# Weights per chunk. On a CPU it weighs the fixed cost of some dozen torch calls, about 0.1 ms, against the cache
# that intermediates of about 6 bytes a weight need: 2^19 to 2^21 measured alike, 2^18 a third slower.
# A GPU needs enough work per kernel launch, at a few tens of MiB of scratch.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 21
# Scratch per weight: no format needs more, the float32 copy of a narrower output included.
SCRATCH_BYTES = 16
# Intermediates of encoders in those of a decoder: the ones that search, and the others.
SEARCH_COST, ENCODER_COST = 16, 4


def weights_per_chunk(device: torch.device) -> int:
    """Weights decoded at a time on this device; more threads share a chunk, but each still needs its part."""
    if device.type != "cpu":
        return GPU_CHUNK
    return max(CPU_CHUNK, CPU_CHUNK // 4 * torch.get_num_threads())


def dequantize(
    data: torch.Tensor,
    fmt: type[Format],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode packed bytes to a tensor of `shape` and `dtype` on their device.

    data: uint8, contiguous, any shape, `fmt.nbytes(shape)` bytes.
    out: contiguous tensor of `shape` and `dtype` on the same device that receives the result, or None.

    The result is the float32 result of the gguf package bit for bit, rounded once when `dtype` is narrower.
    Raises SnugError when the bytes do not fit the shape or `out` does not fit the result.
    """
    shape = tuple(shape)
    if data.dtype != torch.uint8 or not data.is_contiguous():
        raise SnugError(
            f"{fmt.name} data must be a contiguous uint8 tensor, got {data.dtype} {tuple(data.shape)}."
        )
    fmt.check_nbytes(data.numel(), shape)
    out = _output(shape, dtype, data.device, out)
    if out.numel() == 0:
        return out
    if fmt.dtype is not None:
        _copy_plain(data.view(-1), fmt.dtype, out.view(-1))
    elif not decode_by_kernel(PackedTensor(data.view(-1), fmt, shape), out):
        _decode_chunks(data.view(-1, fmt.block_bytes), fmt, out.view(-1, fmt.block_size))
    return out


def dequantize_packed(
    packed: PackedTensor, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode a packed tensor of any format to its logical shape in `dtype`, on its device; `out` as above.

    Rounded once from float32. Scaled formats equal their library's own result in the dtype of their scales.
    """
    fmt, shape = packed.format, tuple(packed.shape)
    if isinstance(fmt, type):
        return dequantize(packed.data, fmt, shape, dtype, out)
    device = packed.data.device
    out = _output(shape, dtype, device, out)
    if out.numel() == 0:
        return out
    if decode_by_kernel(packed, out):
        return out
    rows, columns = rows_and_columns(shape)
    step = min(rows, max(1, weights_per_chunk(device) // columns))
    scratch = Scratch(device, step * columns * SCRATCH_BYTES)
    matrix = out.view(rows, columns)
    direct = fmt.decodes_to(dtype, packed.parts)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        result = matrix[start:stop]
        weights = result if direct else scratch.get("weights", (stop - start, columns), torch.float32)
        fmt.decode_rows(packed.data, packed.parts, shape, start, stop, weights, scratch)
        if not direct:
            result.copy_(weights)
    return out


def quantize(values: torch.Tensor, fmt: type[Format], importance: torch.Tensor | None = None) -> torch.Tensor:
    """Encode values (float, [..., columns]) to packed bytes: uint8 [rows, bytes per row].

    importance: how much the square of an error in each input channel counts (float, at least 0, such as the mean
    square of the channel's inputs), repeated over all values: [columns], or as many as the rows had before they were
    folded. Formats whose blocks leave no choice ignore it; None counts all alike.

    Equal byte for byte to the gguf package for the types that it writes. Raises SnugError when `fmt` cannot be written,
    the last dimension is no whole number of blocks, or the importance does not fit.
    """
    fmt.nbytes(values.shape)
    period = _importance_blocks(importance, values, fmt) if importance is not None else None
    columns = values.shape[-1] if values.dim() else 1
    blocks = values.reshape(-1, fmt.block_size)
    packed = torch.empty((len(blocks), fmt.block_bytes), dtype=torch.uint8, device=values.device)
    cost = SEARCH_COST if fmt.searches else ENCODER_COST
    step = max(1, _encoded_at_once(values.device, cost) // fmt.block_size)

    def encode_chunk(start: int) -> None:
        chunk = blocks[start : start + step].float()
        part = None
        if period is not None:
            index = torch.arange(start, start + len(chunk), device=values.device) % len(period)
            part = period.index_select(0, index)
        packed[start : start + step].copy_(fmt.quantize_blocks(chunk, part))

    share(encode_chunk, range(0, len(blocks), step), step * fmt.block_size, values.device)
    return packed.view(-1, columns // fmt.block_size * fmt.block_bytes)


def _encoded_at_once(device: torch.device, cost: int) -> int:
    """Weights of a chunk to encode; on a CPU each thread has its own. cost: of its intermediates, see above."""
    chunk = weights_per_chunk(device)
    return (min(chunk, CPU_CHUNK) if device.type == "cpu" else chunk) // cost


def _importance_blocks(importance: torch.Tensor, values: torch.Tensor, fmt: type[Format]) -> torch.Tensor:
    """The importance of the values of each block until it repeats, float32 [blocks, block_size] from 0 to 1."""
    count = importance.numel()
    weights = _scaled_importance(importance, count if count and values.numel() % count == 0 else 0, values)
    return weights.repeat(math.lcm(count, fmt.block_size) // count).view(-1, fmt.block_size)


def _scaled_importance(importance: torch.Tensor, count: int, values: torch.Tensor) -> torch.Tensor:
    """float32 [count] from 0 to 1 on values' device; SnugError when there are not `count`, a number above 0."""
    weights = importance.detach().to(values.device, torch.float32).reshape(-1)
    if not count or weights.numel() != count:
        raise SnugError(
            f"Importance for {weights.numel()} input channels does not fit a weight of shape {tuple(values.shape)}; it "
            f"was made with another model."
        )
    # What was measured may be anything from tiny to huge; only the ratios matter.
    weights = weights.nan_to_num(0.0, 0.0, 0.0).clamp_(min=0)
    largest = weights.amax()
    return torch.where(largest > 0, weights / largest, 1.0)


def _by_column(importance: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The importance of input channels for each column: of a kernel's, all of a channel have the same."""
    if importance is not None and len(shape) > 2 and importance.numel() == shape[1]:
        return importance.reshape(-1).repeat_interleave(math.prod(shape[2:]))
    return importance


def quantize_packed(
    values: torch.Tensor, fmt: type[Format] | ScaledFormat, importance: torch.Tensor | None = None
) -> PackedTensor:
    """Encode values (float, any shape) in `fmt`; the result is on their device.

    importance: as `quantize` takes it, float [input channels] of a weight [out, in] or [out, in, height, width];
    formats that leave no choice ignore it.

    Raises SnugError when `fmt` cannot be written or, for ggml, the last dimension is no whole number of blocks.
    """
    shape = tuple(values.shape)
    if isinstance(fmt, type):
        importance = _by_column(importance, shape)
        return PackedTensor(quantize(values, fmt, importance).view(-1), fmt, shape)
    encoder = fmt.encoder()
    if encoder is None:
        raise SnugError(
            f"Snug reads {fmt.name} weights but does not write them; choose a float8 or a GGUF format."
        )
    return encode(values, encoder, importance)


def encode(values: torch.Tensor, encoder: RowEncoder, importance: torch.Tensor | None = None) -> PackedTensor:
    """Encode values (float, any shape) by `encoder`, chunk by chunk of rows; the result is on their device.

    importance: as `quantize_packed` takes it. Raises SnugError when the format cannot hold them.
    """
    fmt, shape = encoder.format, tuple(values.shape)
    rows, columns = rows_and_columns(shape)
    importance = _by_column(importance, shape)
    if importance is not None:
        importance = _scaled_importance(importance, columns, values)
    matrix = values.reshape(rows, columns)
    together = encoder.rows_together(columns)
    cost = ENCODER_COST if values.device.type == "cpu" else 1  # fewer launches
    step = max(1, _encoded_at_once(values.device, cost) // max(1, columns) // together) * together
    shared = encoder.begin(matrix)
    joined = _encoded_rows(
        lambda start: encoder.encode(matrix[start : start + step], importance, shared),
        range(0, rows, step),
        step * columns,
        values.device,
    )
    joined = encoder.finish(joined | shared)
    data = joined.pop(DATA)
    return PackedTensor(data.view(shape) if data.numel() == values.numel() else data, fmt, shape, joined)


def _encoded_rows(
    encode_rows: Callable[[int], Tensors], starts: range, weights: int, device: torch.device
) -> Tensors:
    """Tensors of all rows from those of chunks, which begin at `starts` and have so many weights.

    Each goes to its place at once: kept until all are there, they would lie between the freed memory of intermediates.
    """
    ends: dict[int, Tensors] = {}
    share(
        lambda start: ends.update({start: encode_rows(start)}),
        sorted({starts[0], starts[-1]}),
        weights,
        device,
    )
    first, last = ends[starts[0]], ends[starts[-1]]
    if len(starts) == 1:
        return first
    joined = {
        name: part.new_empty((len(part) * (len(starts) - 1) + len(last[name]), *part.shape[1:]))
        for name, part in first.items()
    }

    def put(start: int) -> None:
        for name, part in (ends.get(start) or encode_rows(start)).items():
            place = starts.index(start) * len(first[name])
            joined[name][place : place + len(part)].copy_(part)

    share(put, starts, weights, device)
    return joined


def _output(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, out: torch.Tensor | None
) -> torch.Tensor:
    if out is None:
        return empty(shape, dtype, device)
    if (tuple(out.shape), out.dtype, out.device, out.is_contiguous()) != (shape, dtype, device, True):
        raise SnugError(
            f"The output must be a contiguous {dtype} tensor of shape {shape} on {device}, "
            f"got {'' if out.is_contiguous() else 'strided '}{out.dtype} {tuple(out.shape)} on {out.device}."
        )
    return out


def _copy_plain(data: torch.Tensor, stored: torch.dtype, out: torch.Tensor) -> None:
    if data.storage_offset() % stored.itemsize:
        data = data.clone()  # a view of another dtype needs an aligned offset
    if data.device.type == "mps" and stored == torch.float64:
        data = data.cpu()  # MPS has no float64
    out.copy_(data.view(stored))


def _decode_chunks(blocks: torch.Tensor, fmt: type[Format], out: torch.Tensor) -> None:
    native = native_decoder(fmt, blocks)
    if native is not None and out.dtype == torch.float32:
        native(blocks, out)
        return
    step = max(1, weights_per_chunk(blocks.device) // fmt.block_size)
    scratch = Scratch(blocks.device, min(step, len(blocks)) * fmt.block_size * SCRATCH_BYTES)
    aligned = blocks.storage_offset() % 8 == 0  # else torch refuses views of wider dtypes
    for chunk, result in zip(blocks.split(step), out.split(step), strict=True):
        if not aligned:
            chunk = scratch.get("chunk", chunk.shape, torch.uint8).copy_(chunk)
        if result.dtype == torch.float32:
            fmt.decode(chunk, result, scratch)
        else:
            weights = scratch.get("weights", result.shape, torch.float32)
            if native is not None:
                native(chunk, weights)
            else:
                fmt.decode(chunk, weights, scratch)
            result.copy_(weights)
