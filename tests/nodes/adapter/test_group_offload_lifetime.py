"""Streamed models that are cloned, forgotten, cancelled, pinned and saved in the orders in which ComfyUI does it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from simulated_transfers import Transfers, simulate_transfers
from snug.quant_backends.memory.slab import host_bytes_in_use


@pytest.fixture(autouse=True)
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """One for each slab that is made."""
    yield simulate_transfers(monkeypatch)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    assert host_bytes_in_use() == 0


def offloaded(patcher: Any, **settings: Any) -> Any:
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model

    return offload_model(patcher, OffloadSettings(**settings))[0]


def streamed_layers(patcher: Any) -> list[torch.nn.Module]:
    from snug.nodes.adapter.offload_units import is_streamed

    return [layer for layer in patcher.model.modules() if is_streamed(layer)]


def test_a_forgotten_clone_keeps_nothing_for_the_plain_model(sd3: Any, model: Any) -> None:
    streamed = offloaded(sd3[0])
    model.run(streamed, load=True)
    clone = streamed.clone()
    del clone
    model.run(sd3[0], load=True)
    assert host_bytes_in_use() == 0
    assert streamed_layers(streamed) == []


def test_a_clone_that_takes_the_place_of_a_forgotten_one_frees_the_slab(sd3: Any, model: Any) -> None:
    """ComfyUI goes on with the parent where the clone that it has loaded is forgotten."""
    streamed = offloaded(sd3[0])
    model.run(model.with_lora(streamed, model.make_lora(sd3[0].model, 1)), load=True)
    assert host_bytes_in_use() > 0
    model.run(sd3[0], load=True)
    assert host_bytes_in_use() == 0
    assert streamed_layers(streamed) == []


def test_the_last_clone_that_is_forgotten_leaves_no_marks(sd3: Any, model: Any) -> None:
    model.run(offloaded(sd3[0]), load=True)
    assert host_bytes_in_use() == 0
    assert streamed_layers(sd3[0]) == []


def test_a_clone_is_streamed_though_the_one_before_dies_later(
    sd3: Any, model: Any, transfers: Transfers
) -> None:
    """ComfyUI loads nothing where it only takes memory back; the clone is in use all the same."""
    import comfy.model_management

    streamed = offloaded(sd3[0], level="leaf")
    first, second = streamed.clone(), streamed.clone()
    model.run(first, load=True)
    assert second.is_clone(first)
    first.detach(unpatch_all=False)
    second.partially_load(second.load_device, -1)
    del first
    copies = sum(event.kind == "copy" for event in transfers[-1].clock.events)
    model.run(second)
    assert sum(event.kind == "copy" for event in transfers[-1].clock.events) > copies + 2
    comfy.model_management.current_loaded_models.clear()
    second.detach()


def test_what_comfyui_has_pinned_is_unpinned_before_it_moves(
    sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is freed while it is registered with the driver stays registered: copies from there go wrong."""
    import comfy.model_management as management

    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> bool:
        pinned.add(tensor.data_ptr())
        return True

    monkeypatch.setattr(management, "pin_memory", pin)
    monkeypatch.setattr(management, "unpin_memory", lambda tensor: pinned.discard(tensor.data_ptr()))
    plain = sd3[1]
    plain.patch_model(plain.load_device, lowvram_model_memory=1)  # as where memory is short
    assert pinned
    streamed = offloaded(plain)
    model.run(streamed, load=True)
    current = {parameter.data_ptr() for parameter in streamed.model.parameters()}
    assert pinned <= current
    management.unload_all_models()
    assert not pinned


def test_saving_a_model_with_a_lora_that_was_not_streamed_before(sd3: Any, model: Any) -> None:
    """ComfyUI merges patches into all weights for that, those of streamed layers included."""
    import comfy.model_management as management

    patched = model.with_lora(sd3[1], model.make_lora(sd3[0].model, 1))
    saved = []
    for which in (patched.clone(), offloaded(patched)):
        management.load_models_gpu([which], force_patch_weights=True)
        saved.append({name: value.clone() for name, value in which.model.state_dict().items()})
        management.unload_all_models()
    for name, value in saved[0].items():
        assert torch.allclose(saved[1][name], value, atol=1e-6), name
    streamed = offloaded(sd3[1])
    assert torch.equal(model.run(streamed, load=True), model.run(sd3[1], load=True))


def test_cancelling_leaves_the_model_unloaded(sd3: Any, model: Any) -> None:
    """An interruption is no error in newer ComfyUI, which unloads after errors only."""
    import comfy.model_management as management

    plain = model.run(sd3[0], load=True)
    streamed = offloaded(sd3[0])
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        management.load_models_gpu([streamed])
    assert streamed_layers(streamed) == []
    assert streamed.loaded_size() == 0
    assert torch.equal(model.run(sd3[0], load=True), plain)


def test_what_is_written_into_weights_between_runs_is_seen(sd3: Any, model: Any) -> None:
    """Other nodes change weights in place, as ComfyUI does itself for some patchers."""
    streamed = offloaded(sd3[1])
    model.run(streamed, load=True)
    unit = streamed.offloading.units(streamed.model)[0]
    for place in unit.places:
        place.original.data.mul_(0.5)
    changed = model.run(streamed, load=True)
    assert torch.equal(changed, model.run(sd3[1], load=True))


def test_blocks_that_begin_with_an_empty_parameter(comfy: Any) -> None:
    import comfy.ops
    from snug.nodes.adapter.offload_streaming import Streaming
    from snug.nodes.adapter.offload_units import BLOCK, offload_units
    from snug.quant_backends.memory.plan import make_plan
    from snug.quant_backends.memory.simulated import SimulatedDevice, SimulatedTransfer

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            self.layer = comfy.ops.manual_cast.Linear(8, 8)
            self.layer.weight.data.normal_()
            self.layer.bias.data.normal_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList(Block() for _ in range(5))
    x = torch.randn(1, 8)
    wanted = [block(x) for block in network.blocks]
    units = offload_units(network, BLOCK)
    plan = make_plan([unit.block for unit in units], prefetch=1)
    streaming = Streaming(network, units, plan, SimulatedTransfer(SimulatedDevice()), lambda _: None)
    streaming.install()
    for _ in range(3):  # an odd number of blocks: each is in both slots in turn
        for block, output in zip(network.blocks, wanted, strict=True):
            assert torch.equal(block(x), output)
    streaming.close()


def test_memory_that_runs_out_while_slots_are_made(
    sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    from snug.quant_backends.memory.simulated import SimulatedTransfer

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError

    wanted = model.run(sd3[1], load=True)
    streamed = offloaded(sd3[1])
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedTransfer, "_host_buffer", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            management.load_models_gpu([streamed])
    assert host_bytes_in_use() == 0
    assert (streamed.loaded_size(), streamed_layers(streamed)) == (0, [])
    for patcher in (streamed, sd3[1]):
        assert torch.equal(model.run(patcher, load=True), wanted)
