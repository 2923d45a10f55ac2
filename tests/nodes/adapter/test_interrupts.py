"""A step that is broken off in the middle of a block leaves a model that samples as if nothing had happened."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from combinations import sample, state_of, with_features
from simulated_transfers import Transfers, simulate_transfers
from snug.quant_backends.memory.slab import host_bytes_in_use

TIMES = 50


class InterruptingCasts:
    """Counts how often a layer asks ComfyUI for its weight, and interrupts in the middle of one such call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import comfy.model_management as management
        import comfy.ops

        self.count = 0
        self.interrupt_at: int | None = None
        original = comfy.ops.cast_bias_weight

        def cast_bias_weight(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.interrupt_at:
                management.interrupt_current_processing()
                management.throw_exception_if_processing_interrupted()
            return original(*args, **options)

        monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)

    def restart(self, interrupt_at: int | None = None) -> None:
        self.count, self.interrupt_at = 0, interrupt_at


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    return simulate_transfers(monkeypatch)


@pytest.fixture(autouse=True)
def as_in_a_workflow(comfy: Any, transfers: Transfers) -> Iterator[None]:
    """ComfyUI runs every node in inference mode; in the end nothing may be left in memory."""
    torch._dynamo.reset()
    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()
    torch._dynamo.reset()
    gc.collect()
    assert host_bytes_in_use() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "setting", "chain"),
    [
        ("Q4_K", 0, ["offload"]),
        ("dense", 1, ["offload", "lora"]),
        ("nf4", 1, ["casting", "offload", "compile"]),
        ("dense", 0, ["lora", "offload", "casting"]),
        ("dense", 0, ["casting", "compile"]),
    ],
)
def test_sampling_again_after_an_interruption(
    format: str,
    chain: list[str],
    setting: int,
    twins: Any,
    monkeypatch: pytest.MonkeyPatch,
    transfers: Transfers,
) -> None:
    import comfy.model_management

    packed, dense = twins("sd3", format if format != "dense" else "Q8_0").load()
    plain = dense if format == "dense" else packed
    before, state = sample(plain, "sd3"), state_of(plain)
    patcher = with_features(plain, chain, setting)
    casts = InterruptingCasts(monkeypatch)
    wanted = sample(patcher, "sd3")
    in_all, slab = casts.count, host_bytes_in_use()
    assert in_all > TIMES
    for number in range(TIMES):
        casts.restart(interrupt_at=1 + number * in_all // TIMES)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patcher, "sd3")
        assert in_slots(patcher, transfers) == []
        assert host_bytes_in_use() == slab
        casts.restart()
        assert torch.equal(sample(patcher, "sd3"), wanted), casts.interrupt_at
    assert torch.equal(sample(plain, "sd3"), before)
    assert state_of(plain) ^ state == set()


def in_slots(patcher: Any, transfers: Transfers) -> list[str]:
    """Names of the weights that lie in a slot, as they may only while their block runs."""
    slots = [(slot.data_ptr(), slot.nbytes) for transfer in transfers for slot in transfer._slots]
    return [
        name
        for name, weight in patcher.model.named_parameters()
        for start, size in slots
        if start <= getattr(weight, "_qdata", weight).data_ptr() < start + size
    ]
