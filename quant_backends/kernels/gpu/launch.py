"""Starting the kernels: grids and tile sizes by format and shape, worked out once."""

# Triton's kernels take plain numbers for what they declare as constants.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ...core.device import multiprocessors, on_device
from ...formats.eight_bit_products import LARGEST
from .blocks import dequantize_blocks
from .matmul import combine, matrix_product, vectors_product
from .operands import MOST_VECTORS, Constants
from .rounding import round_rows
from .tiles import dequantize_tiles

# Weights that a program decodes at a time, by 4 warps: 32 each thread, written in four pieces of 16 bytes of bfloat16.
TILE = 4096
# Programs that occupy a GPU, for each of its multiprocessors.
OCCUPANCY = 2
_COMBINE_SIZE = 1024

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """grid and the constants of a launch; splits and columns of each, for products."""

    grid: tuple[int, ...]
    options: dict[str, Any]
    splits: int = 1
    per_split: int = 0


def _power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()


def _tile_options(found: Constants, rows: int, columns: int, warps: int) -> dict[str, Any]:
    run = min(found.run, columns)
    options = {
        "FAMILY": found.family,
        "KIND": found.kind,
        "A": found.a,
        "B": found.b,
        "C": found.c,
        "D": found.d,
    }
    return options | {
        "RUN": run,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": warps,
        # The formats are defined with each product rounded; of ggml's blocks they are exact anyway.
        "enable_fp_fusion": found.family == "blocks",
    }


@functools.lru_cache(maxsize=4096)
def _blocks_plan(found: Constants) -> Plan:
    rows = TILE // found.a
    options = {"FORMAT": found.kind, "SIZE": found.a, "BYTES": found.b, "ROWS": rows, "num_warps": 4}
    return Plan((-(-found.columns // (found.a * rows)),), options | {"enable_fp_fusion": True})


@functools.lru_cache(maxsize=4096)
def _tiles_plan(found: Constants, low_rank: bool) -> Plan:
    if low_rank:
        columns = max(128, found.step)
    else:
        columns = max(found.step, min(TILE if found.rows == 1 else 1024, _power_of_two(found.columns)), 16)
    rows = max(16 if low_rank else 1, min(TILE // columns, _power_of_two(found.rows)))
    options = _tile_options(found, rows, columns, 4 if rows * columns <= TILE else 8)
    grid = (-(-found.columns // columns) * -(-found.rows // rows),)
    if low_rank and columns > 256:
        options["num_stages"] = (
            1  # factors in float32 for more tiles do not fit into a desktop card's shared memory
        )
    return Plan(grid, options | {"LOW_RANK": low_rank})


@functools.lru_cache(maxsize=4096)
def _product_plan(found: Constants, tokens: int, bias: bool, device: torch.device) -> Plan:
    """tokens: a power of two."""
    if tokens <= MOST_VECTORS:
        columns = max(256, found.step)
        rows, tile, warps = max(1, min(2048, 8192 // tokens) // columns), tokens, 4
    else:
        columns = max(64, found.step)
        # Both factors of 16 bits, those of x twice, have to fit into the 99 KB of shared memory of desktop cards.
        rows = 64 if columns <= 256 else 16
        tile = min(max(16, tokens), 128 if columns <= 128 else 64 if columns <= 256 else 16)
        warps = 4 if rows * columns <= 8192 else 8
    row_tiles, token_tiles = -(-found.rows // rows), -(-tokens // tile)
    steps = -(-found.columns // columns)
    wanted = -(-OCCUPANCY * multiprocessors(device) // (row_tiles * token_tiles))
    per_split = -(-steps // min(wanted, max(1, steps // 4))) * columns
    splits = -(-found.columns // per_split)
    options = _tile_options(found, rows, columns, warps)
    options |= {"TOKENS": tile, "BIAS": bias and splits == 1, "num_stages": 2}
    return Plan((row_tiles, splits, token_tiles), options, splits, per_split)


@functools.lru_cache(maxsize=4096)
def _rounding_plan(found: Constants) -> Plan:
    """A row as one tile or, where that is less, as two: half of its power of two, and what is left.

    Both are whole runs of weights that share a scale, of which the longest have 256.
    """
    whole = max(_power_of_two(found.columns), found.step, 16)
    columns, rest = whole // 2, _power_of_two(max(found.columns - whole // 2, found.step, 256))
    if columns < rest or columns + rest == whole:
        columns, rest = whole, 0
    rows = max(1, min(TILE // columns, _power_of_two(found.rows)))
    options = _tile_options(found, rows, columns, max(4, min(16, rows * columns // 1024)))
    return Plan((-(-found.rows // rows),), options | {"REST": rest})


def dequantize(found: Constants, operands: Tensors, out: torch.Tensor) -> None:
    """out (contiguous, float32, float16 or bfloat16) = the decoded weight. found: from `flat_constants`."""
    with on_device(out.device):
        if found.family == "blocks":
            plan = _blocks_plan(found)
            data, table = operands[:2]
            dequantize_blocks[plan.grid](data, table, out, found.columns // found.a, **plan.options)
            return
        plan = _tiles_plan(found, False)
        extent = _extent(found, operands[0])
        dequantize_tiles[plan.grid](
            *operands, out, out, out, found.rows, found.columns, extent, 0, **plan.options
        )


def dequantize_changed(
    found: Constants, operands: Tensors, up: torch.Tensor, down: torch.Tensor, out: torch.Tensor
) -> None:
    """The same plus up [rows, rank] @ down [rank, columns], both contiguous of one type; rank a multiple of 16."""
    plan = _tiles_plan(found, True)
    rank, extent = up.shape[1], _extent(found, operands[0])
    with on_device(out.device):
        dequantize_tiles[plan.grid](
            *operands, out, up, down, found.rows, found.columns, extent, rank, **plan.options
        )


def round_to_8_bits(
    found: Constants,
    operands: Tensors,
    codes: torch.Tensor,
    scales: torch.Tensor,
    width: int,
    bounded: bool,
) -> None:
    """codes (int8 or float8_e4m3fn [rows, columns]), scales (float32 [rows]) = the weight's rows, rounded.

    found: from `rounding_constants`. width: columns that are rotated together, 1 for none; bounded: as
    `rounding.round_rows` takes it.
    """
    plan, extent = _rounding_plan(found), _extent(found, operands[0])
    stored = str(codes.dtype).removeprefix("torch.")
    options = {"WIDTH": width, "STORED": stored, "LARGEST": LARGEST[stored], "BOUNDED": bounded}
    with on_device(codes.device):
        round_rows[plan.grid](
            *operands,
            codes.view(torch.int8),
            scales,
            found.rows,
            found.columns,
            extent,
            **plan.options,
            **options,
        )


def linear(
    found: Constants, operands: Tensors, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out [tokens, rows] = x [tokens, columns] @ the weight.T + bias; contiguous, x and out of one type."""
    tokens = len(x)
    plan = _product_plan(found, _power_of_two(tokens), bias is not None, out.device)
    kernel = vectors_product if tokens <= MOST_VECTORS else matrix_product
    result = out
    if plan.splits > 1:
        result = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=out.device)
    added = x if bias is None else bias
    sizes = (tokens, found.rows, found.columns, _extent(found, operands[0]), plan.per_split)
    with on_device(out.device):
        kernel[plan.grid](x, *operands, added, result, *sizes, **plan.options)
        if plan.splits > 1:
            count = out.numel()
            combine[(-(-count // _COMBINE_SIZE),)](
                result,
                added,
                out,
                count,
                found.rows,
                plan.splits,
                SIZE=_COMBINE_SIZE,
                BIAS=bias is not None,
                enable_fp_fusion=True,
            )


def _extent(found: Constants, data: torch.Tensor) -> int:
    """Groups that are stored beside one another, of the families that store several in a byte."""
    return data.numel() * 4 // found.b if found.family == "groups" else 0
