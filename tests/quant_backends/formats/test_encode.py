"""Every format that the gguf package can write as well yields its bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from snug.quant_backends.formats import FORMATS, Format

# For the others the package has no encoder: see test_encode_searched.py.
WRITABLE = [
    fmt
    for fmt in FORMATS.values()
    if fmt.can_quantize and not fmt.name.endswith("_K") and "IQ4" not in fmt.name
]
# Where float16 numbers lie in a block; two NaN, or the two zeros as a minimum, may differ in their bits.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "TQ1_0": [52], "TQ2_0": [64]}


def _cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((6, 512)).astype(np.float32)
    below_powers = np.nextafter(np.exp2(np.arange(-140, 128)).astype(np.float32), np.float32(0))

    # Between two codes of four bits in blocks whose scale is 1, beside the numbers next to it, of both signs.
    middles = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10, 12], np.float32)
    middles = np.concatenate(
        [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(16))]
    )
    middles = np.concatenate([middles, -middles, np.zeros(16, np.float32)])

    def with_some(value: float) -> np.ndarray:
        return np.where(rng.random(normal.shape) < 0.01, np.float32(value), normal)

    return {
        "weights": normal * np.float32(0.02),
        "zeros": np.zeros_like(normal),
        "zeros of both signs": normal * 0,
        "largest": normal * np.float32(6e37),
        "float16 overflow": normal * np.float32(1e6),
        "smallest": normal * np.float32(1e-38),
        "subnormal": normal * np.float32(1e-42),
        "ties": np.round(normal * 4) / 4,
        "middles": np.exp2(np.arange(-120, 120, dtype=np.float32)).reshape(-1, 1) * np.tile(middles, 8),
        "powers of two": np.exp2(np.round(normal * 30)).astype(np.float32),
        "just below powers of two": np.repeat(below_powers, 256).reshape(-1, 256),
        "some NaN": with_some(np.nan),
        "some infinite": with_some(np.inf),
        "some negative infinite": with_some(-np.inf),
        "random bits": rng.integers(0, 2**32, normal.shape, dtype=np.uint32).view(np.float32),
    }


CASES = _cases()


def _normalized(fmt: type[Format], blocks: np.ndarray) -> np.ndarray:
    blocks = blocks.reshape(-1, fmt.block_bytes).copy()
    halves = [0] if fmt.name == "F16" else HALVES.get(fmt.name, [])
    for start in halves:
        numbers = blocks[:, start : start + 2].copy().view(np.float16)
        numbers[np.isnan(numbers)] = np.nan
        if start:
            numbers[numbers == 0] = 0
        blocks[:, start : start + 2] = numbers.view(np.uint8)
    return blocks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fmt", WRITABLE, ids=lambda fmt: fmt.name)
def test_bytes_are_the_gguf_package_s(fmt: type[Format], case: str) -> None:
    values = CASES[case]
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[fmt.name]).view(np.uint8)
    found = fmt.quantize_blocks(torch.from_numpy(values).view(-1, fmt.block_size)).numpy()
    np.testing.assert_array_equal(_normalized(fmt, found), _normalized(fmt, expected))


@pytest.mark.parametrize("fmt", WRITABLE, ids=lambda fmt: fmt.name)
def test_what_was_decoded_is_encoded_to_the_same_values(fmt: type[Format]) -> None:
    values = torch.from_numpy(CASES["weights"]).view(-1, fmt.block_size)
    once = fmt.dequantize_blocks(fmt.quantize_blocks(values))
    twice = fmt.dequantize_blocks(fmt.quantize_blocks(once))
    torch.testing.assert_close(twice, once, rtol=2e-3, atol=2e-5)
