"""LoRA modes: each equals the dense model with the LoRA merged, however loaded, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_states import LOADS

EXACT = ["automatic", "merge while dequantizing", "side branch"]
BAKE = "bake in"
FORMATS = [
    ("sd3", "Q8_0"),
    ("sd3", "Q4_K"),
    ("sd3", "nf4"),
    ("sd3", "int8"),
    ("sd3", "fp8"),
    ("sd15", "Q8_0"),
]
TOLERANCE = 1e-4


def with_mode(patcher: Any, mode: str, cache: bool = True) -> Any:
    from snug.nodes.adapter.lora_mode import set_lora_mode

    return set_lora_mode(patcher, mode, cache)[0]


def release(patcher: Any) -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher.detach()


@pytest.fixture
def branched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that have gone through a side branch."""
    from snug.nodes.adapter.side_branch import SideBranch

    shapes: list[torch.Size] = []
    add_to = SideBranch.add_to

    def spy(self: Any, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return add_to(self, output, x)

    monkeypatch.setattr(SideBranch, "add_to", spy)
    return shapes


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_equals_the_dense_model(
    family: str, format: str, mode: str, twins: Any, model: Any, branched: list[torch.Size]
) -> None:
    packed, dense = twins(family, format).load()
    lora, other = (model.make_lora(packed.model, seed) for seed in (1, 2))
    before, plain = model.run(dense, load=True), model.run(packed, load=True)
    chosen = with_mode(packed, mode)
    for loras in ([(lora, 0.8)], [(lora, 0.8), (other, -0.5)], [(lora, 0.3)]):
        patched, wanted = chosen, dense
        for weights, strength in loras:
            patched, wanted = (model.with_lora(p, weights, strength) for p in (patched, wanted))
        output = model.run(wanted, load=True)
        assert model.relative_error(output, before) > 0.01
        for load in LOADS:
            branched.clear()
            load(patched)
            found = model.run(patched)
            assert model.relative_error(found, output) < TOLERANCE, (len(loras), load.__name__)
            assert bool(branched) == (mode != EXACT[1])
            release(patched)
    assert torch.equal(model.run(chosen, load=True), plain), "without LoRA the mode must change nothing"
    assert torch.equal(model.run(packed, load=True), plain), "the given model has changed"
