from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS, Format
from snug.quant_backends.kernels import native
from snug.quant_backends.kernels.dequantize import dequantize
from snug.quant_backends.kernels.linear import linear

RandomBlocks = Callable[..., torch.Tensor]
installed = pytest.mark.skipif(
    importlib.util.find_spec(native.PACKAGE) is None, reason=f"{native.PACKAGE} has no wheel for this machine"
)
native_format = pytest.mark.parametrize("fmt", [FORMATS[name] for name in sorted(native.FASTER)])


def _calls(monkeypatch: pytest.MonkeyPatch, rows: Callable[..., Any] | None) -> list[tuple[Any, ...]]:
    """Puts a library in place that decodes by `rows`; returns the arguments of its calls."""
    calls: list[tuple[Any, ...]] = []

    def decode(*arguments: Any) -> Any:
        calls.append(arguments)
        assert rows is not None
        return rows(*arguments)

    library = None if rows is None else SimpleNamespace(dequantize_rows_into_raw=decode)
    monkeypatch.setattr(native, "_library", lambda: library)
    return calls


@pytest.fixture(autouse=True)
def fresh_checks() -> Iterator[None]:
    native._checked_decoder.cache_clear()
    yield
    native._checked_decoder.cache_clear()


@installed
@native_format
def test_equal_to_torch_and_to_the_gguf_package_bit_for_bit(
    fmt: type[Format], random_blocks: RandomBlocks, reference: Any, assert_same_floats: Any
) -> None:
    blocks = random_blocks(fmt, 501, seed=3)
    blocks[:3] = 0
    decode = native.native_decoder(fmt, blocks)
    assert decode is not None
    found = torch.empty(len(blocks), fmt.block_size)
    decode(blocks, found)
    assert_same_floats(found, reference(fmt, blocks))
    assert_same_floats(found, fmt.dequantize_blocks(blocks).numpy())


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@installed
@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("blocks_in_all", [1, 2, 3, 4, 7, 64, 65])
def test_threads_share_a_tensor_of_any_length(
    blocks_in_all: int, random_blocks: RandomBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "PART", 32)
    fmt = FORMATS["Q8_0"]
    blocks = random_blocks(fmt, blocks_in_all)
    library = importlib.import_module(native.PACKAGE)
    calls = _calls(monkeypatch, library.dequantize_rows_into_raw)
    decode = native.native_decoder(fmt, blocks)
    assert decode is not None
    del calls[:]  # those of the check
    found = torch.full((blocks_in_all, 32), torch.nan)
    decode(blocks, found)
    assert torch.equal(found.nan_to_num(), fmt.dequantize_blocks(blocks).nan_to_num())
    assert len(calls) == min(4, blocks_in_all) or blocks_in_all in (7, 65)
    assert sum(arguments[4] for arguments in calls) == 32 * blocks_in_all


@installed
def test_whole_tensors_and_layers_are_decoded_by_it(
    random_blocks: RandomBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = FORMATS["Q4_0"]
    calls = _calls(monkeypatch, importlib.import_module(native.PACKAGE).dequantize_rows_into_raw)
    monkeypatch.setattr("snug.quant_backends.kernels.linear.CPU_TILE", 16 * 512)
    blocks = torch.zeros(61 * 16, fmt.block_bytes, dtype=torch.uint8)
    blocks[:, 2:] = random_blocks(fmt, len(blocks))[:, 2:]
    blocks[:, 1] = 0x2C  # 2 ** -4
    x = torch.randn(3, 512)
    results = []
    for _ in range(2):
        whole = dequantize(blocks, fmt, (61, 512), torch.bfloat16)
        results.append((whole, linear(x, PackedTensor(blocks.view(-1), fmt, (61, 512)))))
        if len(results) == 1:
            assert len(calls) == 1 + 1 + 4  # the check, the whole tensor, tiles of 16 rows
            monkeypatch.setattr(native, "_wanted", False)
    assert len(calls) == 6
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_without_the_package_torch_decodes_and_a_sentence_says_so(
    random_blocks: RandomBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    _calls(monkeypatch, None)
    fmt = FORMATS["Q8_0"]
    blocks = random_blocks(fmt, 5)
    assert native.native_decoder(fmt, blocks) is None
    found = dequantize(blocks, fmt, (160,))
    assert torch.equal(found.nan_to_num(), fmt.dequantize_blocks(blocks).view(-1).nan_to_num())
    sentence = native.unavailable()
    assert sentence is not None
    assert f"pip install {native.PACKAGE}" in sentence


def test_other_bits_or_another_interface_are_not_used(
    random_blocks: RandomBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = FORMATS["Q8_0"]
    blocks = random_blocks(fmt, 5)

    def right(_type: int, source: np.ndarray, target: np.ndarray, _rows: int, _columns: int) -> None:
        target[:] = fmt.dequantize_blocks(torch.from_numpy(source)).numpy()

    def fused(*arguments: Any) -> None:
        right(*arguments)
        bits = arguments[2].view(np.int32)
        bits[-1, -1] ^= 1  # one unit in the last place of one weight

    def unknown(*_: Any) -> None:
        raise ValueError("unsupported quantization type or row width")

    for rows, usable in ((right, True), (fused, False), (unknown, False)):
        native._checked_decoder.cache_clear()
        _calls(monkeypatch, rows)
        assert (native.native_decoder(fmt, blocks) is not None) is usable


def test_only_plain_tensors_on_the_cpu(random_blocks: RandomBlocks) -> None:
    class Subclass(torch.Tensor):
        pass

    blocks = random_blocks(FORMATS["Q8_0"], 2)
    for unusable in (blocks.to("meta"), blocks.as_subclass(Subclass)):
        assert native.native_decoder(FORMATS["Q8_0"], unusable) is None
    assert native.native_decoder(FORMATS["IQ3_S"], blocks) is None
    with native.torch_only():
        assert native.native_decoder(FORMATS["Q8_0"], blocks) is None
