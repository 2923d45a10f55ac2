"""The check of a kernel's first result, with stand-ins for the kernels: no device and no compiler is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_packed import random_packed
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels import device_products, dispatch
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.kernels.dispatch import TORCH
from snug.quant_backends.kernels.gpu import operands
from snug.quant_backends.kernels.linear import linear

CPU = torch.device("cpu")
Kernels = Callable[..., None]


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has dispatch start these functions as a GPU's kernels, on the CPU."""

    def use(**kernels: Kernels) -> None:
        module = SimpleNamespace(**kernels)
        monkeypatch.setattr(dispatch, "_fails", set())
        monkeypatch.setattr(dispatch, "_proven", set())
        monkeypatch.setattr(dispatch, "_torch_does", lambda device: dispatch._forced == TORCH)
        monkeypatch.setattr(
            dispatch, "_kernels", lambda device, dtype: None if dispatch._forced == TORCH else module
        )

    return use


def product(found: Any, tensors: Any, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """What a kernel calculates for a weight of ones."""
    out.copy_((x.float().sum(1, keepdim=True) + 0).expand(out.shape).to(out.dtype))


def ones() -> Any:
    return quantize_packed(torch.ones(64, 64), FORMATS["Q8_0"])


def test_a_product_that_is_no_number_is_told(
    use_kernels: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    use_kernels(linear=lambda found, tensors, x, bias, out: out.fill_(float("nan")), dequantize=_refuse)
    found = linear(torch.ones(2, 64, dtype=torch.bfloat16), ones())
    assert found.isfinite().all()
    assert any("gave another result than torch" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("first", [float("inf"), 0.0])
def test_what_is_not_finite_or_zero_proves_nothing(first: float, use_kernels: Callable[..., None]) -> None:
    calls: list[torch.Tensor] = []

    def wrong_later(found: Any, tensors: Any, x: torch.Tensor, bias: Any, out: torch.Tensor) -> None:
        calls.append(out.fill_(7 * x[0, 0]))

    use_kernels(linear=wrong_later, dequantize=_refuse)
    weight = ones()
    linear(torch.full((2, 64), first), weight)
    assert not dispatch._proven
    assert torch.allclose(linear(torch.ones(2, 64), weight), torch.tensor(64.0), rtol=1e-3)
    assert len(calls) == 2


def test_only_what_is_finite_is_compared(use_kernels: Callable[..., None]) -> None:
    """Else every call would ask again, and wait for the device."""

    def right(found: Any, tensors: Any, x: torch.Tensor, bias: Any, out: torch.Tensor) -> None:
        out.copy_((x.sum(1, keepdim=True) * dequantize_packed(ones())[0, 0]).expand(out.shape))

    x = torch.ones(2, 64)
    x[0, 0] = float("nan")
    use_kernels(linear=right, dequantize=_refuse)
    found = linear(x, ones())
    assert found[0].isnan().all() and found[1].isfinite().all()
    assert {key[0] for key in dispatch._proven} == {"linear"}


def test_sums_in_16_bits_that_a_user_chose_do_not_count_against_a_kernel(
    use_kernels: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = F.linear

    def coarse(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return exact(x, weight, bias) * (1.02 if x.dtype == torch.float16 else 1.0)

    monkeypatch.setattr(F, "linear", coarse)
    use_kernels(linear=product, dequantize=_refuse)
    linear(torch.ones(2, 64, dtype=torch.float16), ones())
    kinds = {key[0] for key in dispatch._proven}
    assert kinds == {"linear"} and "linear" not in {key[0] for key in dispatch._fails}


def test_bytes_that_torch_cannot_view_as_words_are_read_one_by_one() -> None:
    # The address is a whole number of words, the place in the storage is not.
    memory = torch.zeros(1 << 10, dtype=torch.uint8)
    base = torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=2)
    packed = random_packed("int8-rows", (4, 8))
    data = base[2:34].view(torch.int8).view(4, 8)
    found = operands.constants(packed.format, (4, 8))
    assert data.data_ptr() % 4 == 0 and found is not None
    moved = type(packed)(data, packed.format, (4, 8), packed.parts)
    assert operands.tensors(moved, found) is None
    assert dequantize_packed(moved).shape == (4, 8)


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_trying_a_devices_product_asks_for_no_kernel_on_the_cpu(stored: str) -> None:
    """The trial may be made while tests force the GPU's kernels, and what is right is worked out on the CPU."""

    def nothing(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
        return x.new_zeros(len(x), len(codes))

    with dispatch.using(dispatch.TRITON):
        problem = device_products._problem(nothing, torch.device("cpu"), torch.float32, stored, 1)
    assert problem is not None and problem == "an error of 100.0%"


@pytest.mark.parametrize(("version", "is_used"), [((3, 7), False), ((3, 9), True)])
def test_old_triton_is_not_asked_to_compile_the_rounding_kernel(
    version: tuple[int, int], is_used: bool, use_kernels: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.7, of torch 2.13, makes 328,000 lines of it for IQ3_S, which take minutes."""
    asked: list[str] = []
    use_kernels()
    module = SimpleNamespace(round_to_8_bits=lambda *_, **__: asked.append("round"))
    monkeypatch.setattr(dispatch, "_launch_module", lambda: module)
    monkeypatch.setattr(dispatch, "triton_version", lambda: version)
    monkeypatch.setattr(dispatch, "interprets_kernels", lambda: False)
    assert dispatch.rounds_by_kernel(ones(), CPU) == is_used
    dispatch.round_weight_by_kernel(ones(), "int8", 1)
    dispatch.round_tokens_by_kernel(torch.ones(2, 64), "int8", 1)
    assert bool(asked) == is_used


def _refuse(*_: object) -> None:
    raise RuntimeError("only products here")
