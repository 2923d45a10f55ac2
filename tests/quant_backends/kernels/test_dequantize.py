from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats import FORMATS, Format
from snug.quant_backends.kernels import dequantize as module
from snug.quant_backends.kernels.dequantize import dequantize, quantize

PACKED = [fmt for fmt in FORMATS.values() if fmt.dtype is None]
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
packed_format = pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
RandomBlocks = Callable[..., torch.Tensor]


def _bits(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isnan(), torch.nan, values).view(torch.uint8)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Shrinks chunks to about a thousand weights; returns how many."""
    monkeypatch.setattr(module, "CPU_CHUNK", 1024)
    return module.weights_per_chunk(torch.device("cpu"))


@pytest.mark.usefixtures("torch_alone")
@packed_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_of_every_length(
    fmt: type[Format], dtype: torch.dtype, small_chunks: int, random_blocks: RandomBlocks
) -> None:
    per_chunk = small_chunks // fmt.block_size
    for n in (1, per_chunk - 1, per_chunk, per_chunk + 1, 3 * per_chunk + 2):
        blocks = random_blocks(fmt, n, seed=n)
        found = dequantize(blocks, fmt, (n * fmt.block_size,), dtype)
        assert found.dtype == dtype
        assert torch.equal(_bits(found), _bits(fmt.dequantize_blocks(blocks).to(dtype).view(-1)))


@every_format
@pytest.mark.parametrize("rows", [(1,), (3,), (5, 7), (2, 1, 3)])
def test_shapes(fmt: type[Format], rows: tuple[int, ...], random_blocks: RandomBlocks) -> None:
    shape = (*rows, 2 * fmt.block_size)
    blocks = random_blocks(fmt, fmt.nbytes(shape) // fmt.block_bytes)
    found = dequantize(blocks.view(-1), fmt, shape, torch.float32)
    assert found.shape == shape
    assert torch.equal(_bits(found), _bits(fmt.dequantize_blocks(blocks).float().view(shape)))


@every_format
def test_the_result_goes_into_the_given_tensor(fmt: type[Format], random_blocks: RandomBlocks) -> None:
    blocks = random_blocks(fmt, 6)
    shape = (3, 2 * fmt.block_size)
    out = torch.empty(shape, dtype=torch.bfloat16)
    assert dequantize(blocks, fmt, shape, torch.bfloat16, out=out) is out
    assert torch.equal(_bits(out), _bits(dequantize(blocks, fmt, shape, torch.bfloat16)))


@pytest.mark.usefixtures("torch_alone")
@every_format
def test_bytes_at_any_offset_of_a_file(fmt: type[Format], random_blocks: RandomBlocks) -> None:
    blocks = random_blocks(fmt, 4)
    shape = (4 * fmt.block_size,)
    expected = _bits(dequantize(blocks, fmt, shape, torch.float32))
    for offset in (1, 2, 4, 32):
        file = torch.zeros(offset + blocks.numel(), dtype=torch.uint8)
        file[offset:] = blocks.view(-1)
        assert torch.equal(_bits(dequantize(file[offset:], fmt, shape, torch.float32)), expected)


@every_format
def test_an_empty_tensor(fmt: type[Format]) -> None:
    shape = (0, fmt.block_size)
    assert dequantize(torch.empty(0, dtype=torch.uint8), fmt, shape, torch.float32).shape == shape


@every_format
def test_all_work_stays_on_the_device_of_the_data(fmt: type[Format]) -> None:
    # The meta device refuses to mix with any other, so it shows a table or constant left on the CPU.
    shape = (3, 8 * fmt.block_size)
    packed = torch.empty(fmt.nbytes(shape), dtype=torch.uint8, device="meta")
    assert dequantize(packed, fmt, shape, torch.bfloat16).device.type == "meta"
    if fmt.can_quantize:
        assert quantize(torch.empty(shape, device="meta"), fmt).device.type == "meta"


def test_the_packed_bytes_are_left_as_they_were(random_blocks: RandomBlocks) -> None:
    for fmt in PACKED:
        blocks = random_blocks(fmt, 8)
        before = blocks.clone()
        dequantize(blocks, fmt, (8 * fmt.block_size,), torch.float32)
        assert torch.equal(blocks, before), fmt.name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autograd_modes(mode: Callable[[], torch.no_grad], random_blocks: RandomBlocks) -> None:
    blocks = random_blocks(FORMATS["IQ2_S"], 2)
    expected = dequantize(blocks, FORMATS["IQ2_S"], (512,), torch.float32)
    with mode():
        assert torch.equal(
            _bits(dequantize(blocks, FORMATS["IQ2_S"], (512,), torch.float32)), _bits(expected)
        )


def test_tables_made_in_inference_mode_serve_afterwards(random_blocks: RandomBlocks) -> None:
    # A first call under ComfyUI's sampler is in inference mode; what it caches must not be tied to that.
    from snug.quant_backends.formats import iq_tables, tables

    for fmt in PACKED:
        blocks = random_blocks(fmt, 2)
        for cached in (tables.bit_bytes, tables.sign_bytes, tables.delta_grid, iq_tables.grid_table):
            cached.cache_clear()
        with torch.inference_mode():
            first = dequantize(blocks, fmt, (2 * fmt.block_size,), torch.float32)
        assert torch.equal(_bits(dequantize(blocks, fmt, (2 * fmt.block_size,), torch.float32)), _bits(first))


def test_wrong_byte_counts_are_refused() -> None:
    with pytest.raises(SnugError, match=r"Q4_K tensor of shape \(2, 256\) takes 288 bytes .* got 144 bytes"):
        dequantize(torch.zeros(144, dtype=torch.uint8), FORMATS["Q4_K"], (2, 256), torch.float32)


def test_blocks_may_cross_rows(random_blocks: RandomBlocks) -> None:
    blocks = random_blocks(FORMATS["Q4_K"], 9)
    found = dequantize(blocks, FORMATS["Q4_K"], (4, 64, 3, 3), torch.float32)
    assert torch.equal(_bits(found).view(-1), _bits(FORMATS["Q4_K"].dequantize_blocks(blocks)).view(-1))


def test_part_blocks_are_refused() -> None:
    with pytest.raises(SnugError, match="in whole blocks of 256 weights, got 144 bytes for 255 weights"):
        dequantize(torch.zeros(144, dtype=torch.uint8), FORMATS["Q4_K"], (255,), torch.float32)


@pytest.mark.parametrize("data", [torch.zeros(34, dtype=torch.int8), torch.zeros(68, dtype=torch.uint8)[::2]])
def test_anything_but_contiguous_bytes_is_refused(data: torch.Tensor) -> None:
    with pytest.raises(SnugError, match="contiguous uint8"):
        dequantize(data, FORMATS["Q8_0"], (32,), torch.float32)


@pytest.mark.parametrize(
    "out",
    [torch.empty(33), torch.empty(32, dtype=torch.float16), torch.empty(64)[::2]],
    ids=["size", "dtype", "strides"],
)
def test_an_output_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(SnugError, match=r"output must be a contiguous torch.float32 tensor of shape \(32,\)"):
        dequantize(torch.zeros(34, dtype=torch.uint8), FORMATS["Q8_0"], (32,), torch.float32, out=out)


@pytest.mark.parametrize(
    "fmt", [fmt for fmt in FORMATS.values() if fmt.can_quantize], ids=lambda fmt: fmt.name
)
def test_quantizing_keeps_rows_apart(fmt: type[Format], small_chunks: int) -> None:
    values = torch.randn(2, 5, 1024, generator=torch.Generator().manual_seed(0)) / 50
    packed = quantize(values, fmt)
    assert packed.shape == (10, fmt.nbytes((1024,)))
    assert torch.equal(packed.view(-1, fmt.block_bytes), fmt.quantize_blocks(values.view(-1, fmt.block_size)))
    assert torch.equal(quantize(values[1], fmt), packed[5:])


def test_narrow_values_are_quantized_in_float32() -> None:
    values = torch.randn(4, 64).to(torch.bfloat16)
    assert torch.equal(quantize(values, FORMATS["Q8_0"]), quantize(values.float(), FORMATS["Q8_0"]))


def test_quantizing_part_blocks_is_refused() -> None:
    with pytest.raises(SnugError, match="last dimension 100 is not a multiple"):
        quantize(torch.zeros(2, 100), FORMATS["Q8_0"])
