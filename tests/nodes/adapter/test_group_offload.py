"""Group offloading of real tiny models, on a simulated device: slots hold poison until their copy was waited for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiled_models import compiled, compiles, predict
from narrow_models import accept_narrow_models
from simulated_transfers import Transfers, simulate_transfers
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.slab import host_bytes_in_use
from twins import Twins

TwinsOf = Callable[[str, str], Twins]


@pytest.fixture(autouse=True)
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """One for each slab that is made."""
    accept_narrow_models(monkeypatch)
    yield simulate_transfers(monkeypatch)
    unload()
    gc.collect()
    assert host_bytes_in_use() == 0


def unload() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()


def load(patcher: Any) -> Any:
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    return patcher


def offloaded(patcher: Any, **settings: Any) -> Any:
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model

    return offload_model(patcher, OffloadSettings(**settings))[0]


def run(patcher: Any, family: str = "sd3", **options: Any) -> torch.Tensor:
    return predict(load(patcher), family, **options)


def copies(transfers: Transfers) -> int:
    return sum(event.kind == "copy" for transfer in transfers for event in transfer.clock.events)


def parameters(patcher: Any) -> list[int]:
    """What identifies the weights of a model and where they are."""
    from snug.nodes.adapter.layout import is_packed

    found = (module._parameters.values() for module in patcher.model.modules())
    values = [value for group in found for value in group if value is not None]
    return [(value._qdata if is_packed(value) else value).data_ptr() for value in values]


@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("family", ["sd3", "flux", "sd15"])
def test_output_is_that_of_the_plain_model(
    twins: TwinsOf, transfers: Transfers, family: str, level: str
) -> None:
    for patcher in twins(family, "Q8_0").load():
        wanted = run(patcher, family)
        streamed = offloaded(patcher, level=level, prefetch=1)
        before = copies(transfers)
        for _ in range(3):
            assert torch.equal(run(streamed, family), wanted)
        assert copies(transfers) - before >= 2 * len(streamed.offloading.units(streamed.model))
        assert torch.equal(run(patcher, family), wanted), "not undone"
        assert host_bytes_in_use() == 0


@pytest.mark.parametrize("format", ["Q4_0", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("lora_first", [False, True])
def test_lora(
    twins: TwinsOf, transfers: Transfers, model: Any, format: str, is_dense: bool, lora_first: bool
) -> None:
    patcher = twins("sd3", format).load()[is_dense]
    lora = model.make_lora(twins("sd3", format).load()[0].model, 1)
    plain = run(patcher)
    wanted = run(model.with_lora(patcher, lora, 0.8))
    streamed = (
        offloaded(model.with_lora(patcher, lora, 0.8))
        if lora_first
        else model.with_lora(offloaded(patcher), lora, 0.8)
    )
    for _ in range(2):
        assert model.relative_error(run(streamed) - plain, wanted - plain) < 1e-4
    assert copies(transfers)
    assert torch.equal(run(offloaded(patcher)), plain)


def test_a_changed_lora_streams_from_the_same_slab(sd3: Any, transfers: Transfers, model: Any) -> None:
    streamed = offloaded(sd3[0])
    lora = model.make_lora(sd3[0].model, 1)
    found = [run(model.with_lora(streamed, lora, strength)) for strength in (0.2, 0.8, 0.2)]
    gc.collect()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(run(streamed), run(sd3[0]))
    assert len(transfers) == 1


def test_a_second_queue_entry_streams_from_the_same_slab(sd3: Any, transfers: Transfers) -> None:
    streamed = offloaded(sd3[1])
    for _ in range(3):
        run(streamed)
    assert len(transfers) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_two_clones_with_different_settings(sd3: Any, transfers: Transfers, number: int) -> None:
    wanted = run(sd3[number])
    size = sd3[number].model_size()
    clones = [
        offloaded(sd3[number], limit=int(0.8 * size), level="leaf"),
        sd3[number],
        offloaded(sd3[number], blocks_per_group=2),
    ]
    for patcher in clones * 2:
        assert torch.equal(run(patcher), wanted)
    assert len(transfers) == 4


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("part", [0.75, 0.9, 2.0])
def test_weights_stay_within_the_limit(sd3: Any, transfers: Transfers, number: int, part: float) -> None:
    wanted = run(sd3[number])
    whole = load(offloaded(sd3[number], limit=1 << 40)).loaded_size()
    assert 0.8 * sd3[number].model_size() < whole <= sd3[number].model_size()
    streamed = offloaded(sd3[number], limit=int(part * whole), level="leaf")
    assert torch.equal(run(streamed), wanted)
    assert streamed.loaded_size() <= part * whole
    assert bool(copies(transfers)) == (part < 1)
    if part < 1:
        streaming = streamed.offloading.streaming(streamed.model)
        assert streamed.loaded_size() > 0.7 * part * whole
        assert streaming.slot_bytes == streaming.plan.slots * streaming.plan.slot_bytes > 0


def test_a_limit_that_cannot_be_kept_is_refused_at_once(sd3: Any) -> None:
    with pytest.raises(SnugError, match="allow"):
        offloaded(sd3[0], limit=1000)


def test_what_is_broken_off_is_put_back(sd3: Any, transfers: Transfers, model: Any) -> None:
    class Broken(BaseException):
        pass

    def break_off(*_: Any) -> None:
        raise Broken

    streamed = load(offloaded(sd3[0]))
    ids = parameters(streamed)
    wanted = predict(streamed, "sd3")
    units = streamed.offloading.units(streamed.model)
    for unit in (units[0], units[-1]):
        layer = next(layer for layer in unit.module.modules() if hasattr(layer, "out_features"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(layer.__dict__, "forward", break_off)
            with pytest.raises(Broken):
                predict(streamed, "sd3")
        assert parameters(streamed) != ids, "nothing was streamed when it was broken off"
        streamed.cleanup()  # as the sampler does whatever happens
        assert parameters(streamed) == ids
        assert torch.equal(predict(streamed, "sd3"), wanted)
    assert torch.equal(run(streamed), wanted)


def test_unloading_and_forgetting_free_the_slab(sd3: Any) -> None:
    streamed = offloaded(sd3[0])
    run(streamed)
    assert host_bytes_in_use() > 0
    unload()
    assert host_bytes_in_use() == 0
    run(streamed)
    assert host_bytes_in_use() > 0
    del streamed
    gc.collect()
    assert host_bytes_in_use() == 0
    ids = parameters(sd3[0])
    run(sd3[0])
    assert parameters(sd3[0]) == ids


def test_memory_that_comfyui_wants_back(sd3: Any) -> None:
    streamed = offloaded(sd3[0], limit=int(0.8 * sd3[0].model_size()), level="leaf")
    wanted = run(streamed)
    taken = streamed.loaded_size()
    freed = streamed.partially_unload(streamed.offload_device, taken)
    assert freed >= 0.99 * taken
    assert streamed.loaded_size() <= 0.01 * taken
    assert host_bytes_in_use() == 0
    assert torch.equal(predict(streamed, "sd3"), wanted), "not right without slots"
    assert torch.equal(run(streamed), wanted)
    assert streamed.loaded_size() > 0.9 * taken


@pytest.mark.parametrize("scope", ["regional (repeated blocks)", "whole model"])
@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_compiled_models_are_streamed_and_not_compiled_again(
    twins: TwinsOf, transfers: Transfers, model: Any, family: str, level: str, scope: str
) -> None:
    plain = twins(family, "Q8_0").load()[0]
    wanted = run(plain, family)
    lora = model.make_lora(plain.model, 1)
    for patcher in (
        compiled(offloaded(plain, level=level, prefetch=1), scope=scope),
        offloaded(compiled(plain, scope=scope), level=level, prefetch=1),
    ):
        before = copies(transfers)
        assert torch.allclose(run(patcher, family), wanted, atol=1e-4)
        assert copies(transfers) - before >= len(patcher.offloading.units(patcher.model))
        with compiles(at_most=0):
            for changed in (patcher, model.with_lora(patcher, lora), patcher):
                found = run(changed, family)
        assert torch.allclose(found, wanted, atol=1e-4)


def test_order_of_execution_is_learned(twins: TwinsOf, transfers: Transfers) -> None:
    patcher = twins("sd3", "Q8_0").load()[0]
    wanted = run(patcher)
    streamed = offloaded(patcher, level="leaf")
    late = []
    for _ in range(3):
        assert torch.equal(run(streamed), wanted)
        streaming = streamed.offloading.streaming(streamed.model)
        before = streaming.late_copies
        predict(streamed, "sd3")
        late.append(streaming.late_copies - before)
    assert late[0] > 0, "layers happen to run in the order of their modules: this shows nothing"
    assert late[-1] == 0
