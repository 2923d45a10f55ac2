"""Decoding all blocks of a ggml tensor to their weights: one tile of blocks for each program."""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .iq import iq1_m, iq1_s, iq2_s, iq2_xs, iq2_xxs, iq3_s, iq3_xxs
from .k_quants import q2_k, q3_k, q4_k, q5_k, q6_k, tq1_0, tq2_0
from .legacy import iq4_nl, iq4_xs, mxfp4, nvfp4, q1_0, q4_0, q4_1, q5_0, q5_1, q8_0
from .memory import rounded


@triton.jit
def decode(data, table, block, valid, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    """float32 [ROWS, weights per block]: the blocks with the numbers `block` [ROWS, 1] where `valid`.

    table: what the format looks up, as `operands.block_table` makes it; any pointer where it looks up nothing.
    """
    if FORMAT == "Q4_0":
        values = q4_0(data, block, valid, ROWS)
    elif FORMAT == "Q4_1":
        values = q4_1(data, block, valid, ROWS)
    elif FORMAT == "Q5_0":
        values = q5_0(data, block, valid, ROWS)
    elif FORMAT == "Q5_1":
        values = q5_1(data, block, valid, ROWS)
    elif FORMAT == "Q8_0":
        values = q8_0(data, block, valid, ROWS)
    elif FORMAT == "Q2_K":
        values = q2_k(data, block, valid, ROWS)
    elif FORMAT == "Q3_K":
        values = q3_k(data, block, valid, ROWS)
    elif FORMAT == "Q4_K":
        values = q4_k(data, block, valid, ROWS)
    elif FORMAT == "Q5_K":
        values = q5_k(data, block, valid, ROWS)
    elif FORMAT == "Q6_K":
        values = q6_k(data, block, valid, ROWS)
    elif FORMAT == "Q1_0":
        values = q1_0(data, block, valid, ROWS)
    elif FORMAT == "TQ1_0":
        values = tq1_0(data, block, valid, ROWS)
    elif FORMAT == "TQ2_0":
        values = tq2_0(data, block, valid, ROWS)
    elif FORMAT == "IQ4_NL":
        values = iq4_nl(data, table, block, valid, ROWS)
    elif FORMAT == "IQ4_XS":
        values = iq4_xs(data, table, block, valid, ROWS)
    elif FORMAT == "MXFP4":
        values = mxfp4(data, table, block, valid, ROWS)
    elif FORMAT == "NVFP4":
        values = nvfp4(data, table, block, valid, ROWS)
    elif FORMAT == "IQ2_XXS":
        values = iq2_xxs(data, table, block, valid, ROWS)
    elif FORMAT == "IQ2_XS":
        values = iq2_xs(data, table, block, valid, ROWS)
    elif FORMAT == "IQ2_S":
        values = iq2_s(data, table, block, valid, ROWS)
    elif FORMAT == "IQ3_XXS":
        values = iq3_xxs(data, table, block, valid, ROWS)
    elif FORMAT == "IQ3_S":
        values = iq3_s(data, table, block, valid, ROWS)
    elif FORMAT == "IQ1_S":
        values = iq1_s(data, table, block, valid, ROWS)
    else:
        tl.static_assert(FORMAT == "IQ1_M")
        values = iq1_m(data, table, block, valid, ROWS)
    return values


@triton.jit
def dequantize_blocks(
    data,
    table,
    out,
    blocks,
    FORMAT: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out [blocks, SIZE] = the decoded blocks; each program does ROWS of them.

    data: packed bytes, as integers that a block is whole multiples of.
    """
    BITS: tl.constexpr = data.dtype.element_ty.primitive_bitwidth
    UNITS: tl.constexpr = BYTES * 8 // BITS
    first = tl.program_id(0).to(tl.int64) * ROWS
    block = tl.arange(0, ROWS)[:, None]
    valid = block < blocks - first
    values = decode(data + first * UNITS, table, block, valid, FORMAT, ROWS)
    place = out + first * SIZE + block * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(place, rounded(values, out.dtype.element_ty), mask=valid)
