"""Fast matmul on real models: close to exact, whatever the weights are stored in, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_models import compiled, compiles, fresh_compiler, predict  # noqa: F401
from memory_states import LOADS, load_whole
from narrow_models import accept_narrow_models

# More tokens than products need; of a smaller latent, fewer.
SIDE, SMALL = 16, 8


def fast(patcher: Any, mode: str = "int8", leave_out: str = "default", keep: bool = True, **more: Any) -> Any:
    from snug.nodes.adapter.fast_matmul import set_fast_matmul

    return set_fast_matmul(patcher, mode, leave_out, keep, **more)[0]


def report(patcher: Any, mode: str, leave_out: str = "default", keep: bool = True, **more: Any) -> str:
    from snug.nodes.adapter.fast_matmul import set_fast_matmul

    return set_fast_matmul(patcher, mode, leave_out, keep, **more)[1]


def run(patcher: Any, family: str, side: int = SIDE) -> torch.Tensor:
    load_whole(patcher)
    patcher.model.current_patcher = patcher
    return predict(patcher, family, side=side)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_narrow_models(monkeypatch)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that have been multiplied in 8 bits."""
    from snug.nodes.adapter import fast_calls

    shapes: list[torch.Size] = []
    original = fast_calls.rounded_linear

    def spy(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(x.shape)
        return original(x, *rest)

    monkeypatch.setattr(fast_calls, "rounded_linear", spy)
    return shapes


@pytest.mark.parametrize(
    ("family", "format", "side"),
    [
        ("sd3", "Q4_K", 16),
        ("flux", "nf4", 16),
        ("wan", "Q8_0", 16),
        ("sd3", "fp8-rows", 16),
        ("sd15", "Q8_0", 16),
    ],
)
def test_close_to_exact_and_gone_without_it(
    family: str, format: str, side: int, twins: Any, model: Any, products: list[torch.Size]
) -> None:
    packed, dense = twins(family, format).load()
    exact = run(packed, family, side)
    for mode, bound in (("int8", 0.03), ("fp8", 0.08)):
        chosen = fast(packed, mode)
        found = run(chosen, family, side)
        assert products and min(shape.numel() // shape[-1] for shape in products) >= 32
        assert 1e-5 < model.relative_error(found, exact) < bound
        products.clear()
        assert torch.equal(run(packed, family, side), exact), "the given model has changed"
        assert torch.equal(run(fast(chosen, "off"), family, side), exact)
        assert not products
    assert model.relative_error(run(fast(dense), family, side), run(dense, family, side)) < 0.03
    assert products, "plain weights must multiply in 8 bits as well"


def test_few_tokens_are_exact(sd3: Any, products: list[torch.Size]) -> None:
    packed, _ = sd3
    exact = run(packed, "sd3", SMALL)
    assert torch.equal(run(fast(packed), "sd3", SMALL), exact)
    assert not products


def test_which_layers(twins: Any) -> None:
    from snug.nodes.adapter.fast_calls import fast_call_settings

    packed, _ = twins("flux", "Q8_0").load()
    names = {name.removeprefix("diffusion_model.") for name in fast_call_settings(fast(packed)).layers}
    assert {"single_blocks.0.linear1", "single_blocks.1.linear2"} <= names
    assert not [name for name in names if "mod" in name or "txt" in name or "blocks" not in name]
    fewer = fast_call_settings(fast(packed, leave_out="default, single_blocks")).layers
    assert {"diffusion_model." + name for name in names if "single_blocks" not in name} == fewer
    everything = fast_call_settings(fast(packed, leave_out="")).layers
    assert "diffusion_model.single_blocks.0.modulation.lin" in everything
    assert not [name for name in everything if "blocks" not in name]


@pytest.mark.parametrize("keep", [True, False])
def test_lora_stays_beside_the_product(
    keep: bool, twins: Any, model: Any, products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    from snug.nodes.adapter import fast_calls
    from snug.nodes.adapter.layout import packed_tensor
    from snug.quant_backends.kernels.dequantize import dequantize_packed

    packed, _ = twins("sd3", "Q4_0").load()
    if not keep:
        monkeypatch.setattr(fast_calls, "fewest_tokens", lambda *_: 32)
    lora = model.make_lora(packed.model, 1)
    chosen = fast(packed, keep=keep)
    alone = run(chosen, "sd3")
    change = run(model.with_lora(packed, lora, 0.8), "sd3") - run(packed, "sd3")
    products.clear()
    found = run(model.with_lora(chosen, lora, 0.8), "sd3") - alone
    assert products
    assert model.relative_error(found, change) < 0.1
    # So weak that it would be lost in the rounding of a merged weight.
    load_whole(weak := model.with_lora(chosen, lora, 1e-3))
    monkeypatch.setattr(fast_calls, "fewest_tokens", lambda *_: 32)
    layer = weak.model.get_submodule("diffusion_model.joint_blocks.0.x_block.mlp.fc1")
    x, product = torch.randn(64, layer.in_features), fast_calls.Product("int8")
    merged = layer.dense_weight().double()
    difference = x.double() @ (merged - dequantize_packed(packed_tensor(layer.weight)).double()).t()
    both = product(layer, x, layer.weight, None)
    patches, layer.weight_patches = layer.weight_patches, None
    without = product(layer, x, layer.weight, None)
    layer.weight_patches = patches
    assert both is not None and without is not None
    assert model.relative_error((both - without).double(), difference) < 1e-3
    before = fast(model.with_lora(packed, lora, 0.8), keep=keep)  # either order of nodes
    assert torch.equal(run(before, "sd3"), run(model.with_lora(chosen, lora, 0.8), "sd3"))
    assert torch.equal(run(chosen, "sd3"), alone)


def test_other_changes_of_the_weight_are_exact(sd3: Any, model: Any, products: list[torch.Size]) -> None:
    """A full difference has no side branch, and a wrapper may be anything."""
    packed, _ = sd3
    name = "diffusion_model.joint_blocks.0.x_block.mlp.fc1"
    layer = packed.model.get_submodule(name)
    difference = {f"{name}.weight": ("diff", (torch.randn(layer.weight.shape),))}
    outputs = {}
    for kind, base in (("exact", packed), ("fast", fast(packed))):
        patched = base.clone()
        assert patched.add_patches(difference, 1.0)
        patched.add_weight_wrapper("diffusion_model.joint_blocks.1.x_block.attn.qkv.weight", lambda w: w * 3)
        products.clear()
        outputs[kind] = run(patched, "sd3")
    plain = len(products)
    run(fast(packed), "sd3")
    assert len(products) - plain == plain + 2
    assert model.relative_error(outputs["fast"], outputs["exact"]) < 0.03


def test_however_the_model_is_loaded(sd3: Any, model: Any, products: list[torch.Size]) -> None:
    import comfy.model_management

    packed, _ = sd3
    chosen = fast(packed)
    wanted = run(chosen, "sd3")
    count = len(products)
    for load in LOADS:
        comfy.model_management.unload_all_models()
        chosen.detach()
        load(chosen)
        products.clear()
        assert torch.equal(predict(chosen, "sd3", side=SIDE), wanted), load.__name__
        assert len(products) == count


def test_with_group_offload_and_precision(
    sd3: Any, model: Any, products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    from snug.nodes.adapter import fast_calls
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model
    from snug.nodes.adapter.precision import PrecisionSettings, set_precision

    packed, _ = sd3
    wanted = run(fast(packed), "sd3")
    products.clear()
    monkeypatch.setattr(fast_calls, "fewest_tokens", lambda *_: 32)  # no copies of what is streamed
    offloaded, _ = offload_model(fast(packed), OffloadSettings())
    assert torch.equal(run(offloaded, "sd3"), wanted)
    assert products
    products.clear()
    fused, _ = set_precision(fast(packed), PrecisionSettings(fuse_qkv=True))
    assert torch.equal(run(fused, "sd3"), wanted)
    assert products


def test_compiled_blocks(sd3: Any, model: Any, products: list[torch.Size]) -> None:
    packed, _ = sd3
    wanted = run(fast(packed), "sd3")
    products.clear()
    both = [compiled(fast(packed)), fast(compiled(packed))]
    for patcher in both:
        assert model.relative_error(run(patcher, "sd3"), wanted) < 0.01  # as roundings fall to either side
        assert products
        products.clear()
    lora = model.make_lora(packed.model, 1)
    with compiles(0):
        run(model.with_lora(both[0], lora, 0.5), "sd3")


def test_the_report(twins: Any, sd3: Any) -> None:
    packed, _ = sd3
    text = report(packed, "int8")
    assert text.startswith("fast matmul: int8 in 16 layers; ")
    assert "modulation" in text and "text" in text
    assert "error of the rounded weights" in text and "joint_blocks.*.x_block.attn.qkv: 0." in text
    assert "groups of 256 channels" in text
    assert "no faster product" in report(packed, "fp8")
    assert report(packed, "off") == "fast matmul: off; every layer multiplies exactly"


def test_the_report_with_a_calibration(sd3: Any) -> None:
    from snug.quant_backends.quantization.recording import Recorder

    packed, _ = sd3
    load_whole(packed)
    with Recorder(packed.model.diffusion_model) as recorder:
        predict(packed, "sd3", side=SIDE)
    text = report(packed, "int8", calibration=recorder.calibration())
    assert "error of the layers' outputs, for the calibration's inputs" in text
    percents = [
        float(line.rpartition(" ")[2].rstrip("%")) for line in text.splitlines() if line.endswith("%")
    ]
    assert len(percents) > 3 and all(0.3 < percent < 4 for percent in percents), text


def test_automatic_goes_by_the_device(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter import fast_matmul
    from snug.nodes.adapter.fast_calls import fast_call_settings

    packed, _ = sd3
    for stored in ("int8", "float8_e4m3fn"):
        monkeypatch.setattr(fast_matmul, "faster_product", lambda _, stored=stored: stored)
        assert fast_call_settings(fast(packed, "auto")).stored == stored
    monkeypatch.setattr(fast_matmul, "faster_product", lambda _: None)
    assert not fast_call_settings(fast(packed, "auto")).stored
    assert "does not multiply 8-bit numbers faster" in report(packed, "auto")
