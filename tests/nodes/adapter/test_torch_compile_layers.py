"""SnugTorchCompile: layers whose weights change in shape or place while the model runs compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_models import compiled, compiles, fresh_compiler, load_part, predict  # noqa: F401
from memory_states import load_whole
from quantized_files import KINDS
from random_packed import random_packed

TOLERANCE = 1e-5
REGIONAL, WHOLE = "regional (repeated blocks)", "whole model"
GGUF = ["Q2_K", "Q4_0", "Q4_K", "Q5_1", "Q8_0", "IQ4_XS", "BF16", "F16"]


@pytest.mark.slow
@pytest.mark.parametrize("format", [*GGUF, *KINDS])
def test_fullgraph_compiles_every_format(format: str, twins: Any) -> None:
    """Without a break, in the two graphs of SD3's two kinds of blocks, resident and offloaded."""
    plain = twins("sd3", format).load()[0]
    patcher = compiled(plain, fullgraph=True)
    loads: list[Callable[[Any], None]] = [load_whole, lambda patcher: load_part(patcher, 1)]
    for load, at_most in zip(loads, (2, 0), strict=True):
        load(patcher)
        with compiles(at_most):
            fast = predict(patcher, "sd3")
        load(plain)
        assert torch.allclose(fast, predict(plain, "sd3"), atol=TOLERANCE)


@pytest.mark.slow
def test_lora_that_adds_channels(sd15: Any) -> None:
    """As LoRAs for inpainting do: the model is given a latent and a mask where it was given a latent."""
    import comfy.sd

    plain, _ = sd15
    patcher = compiled(plain, scope=WHOLE)
    generator = torch.Generator().manual_seed(3)
    layer = "diffusion_model.input_blocks.0.0"
    lora = {
        f"{layer}.lora_up.weight": torch.randn(320, 4, 1, 1, generator=generator),
        f"{layer}.lora_down.weight": torch.randn(4, 9, 3, 3, generator=generator) * 0.1,
        f"{layer}.reshape_weight": torch.tensor([320, 9, 3, 3]),
    }
    mask = {"c_concat": torch.randn(1, 5, 8, 8, generator=generator)}
    whole: Callable[[Any], None] = load_whole
    states: list[tuple[bool, Callable[[Any], None]]] = [
        (False, whole),
        (True, whole),
        (True, lambda patcher: load_part(patcher, 1)),
        (False, whole),
    ]
    for changed, load in states:
        outputs = []
        for current in (patcher, plain):
            if changed:
                current, _ = comfy.sd.load_lora_for_models(current, None, dict(lora), 1.0, 0)
            load(current)
            inputs: dict[str, Any] = mask if changed else {}
            outputs.append(predict(current, "sd15", **inputs))
        assert torch.allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_K"])
def test_tables_and_transposed_convolutions(format: str, comfy: Any) -> None:
    """Layers that denoisers have outside of their blocks; other weights in them compile nothing."""
    from snug.nodes.adapter.compiled_layers import opaque_layers, replaced_forwards
    from snug.nodes.adapter.layout import pack
    from snug.nodes.adapter.operations import build_operations
    from snug.nodes.adapter.packed_module import LoadSettings

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            operations: Any = build_operations(LoadSettings(on_weight=lambda nbytes: None))
            self.table = operations.Embedding(96, 256, dtype=torch.float32)
            self.convolution = comfy.ops.manual_cast.ConvTranspose2d(4, 8, 2, stride=2, dtype=torch.bfloat16)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.table(ids, out_dtype=torch.float16) * 2, self.table(ids) * 2, self.convolution(x)

    network, data = Network(), random_packed(format, (96, 256))
    network.table.load_state_dict({"weight": pack(data, torch.float32)})
    inputs = torch.tensor([[1, 95, 2]]), torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    fast = torch.compile(network, backend="aot_eager", fullgraph=True)
    for seed, graphs in ((1, 1), (2, 0)):
        for weight in network.convolution.parameters():
            weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        wanted = network(*inputs)
        with replaced_forwards(opaque_layers(network)), compiles(graphs), torch.inference_mode():
            found = fast(*inputs)
        for value, reference in zip(found, wanted, strict=True):
            assert value.dtype == reference.dtype
            assert torch.allclose(value, reference, atol=TOLERANCE, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("scope", [REGIONAL, WHOLE])
def test_weights_that_hooks_bring(scope: str, sd3: Any) -> None:
    """Group offloading puts weights into a block just before it runs and takes them out again.

    In the whole model hooks of blocks do not run: the layers use the weights that they have.
    """
    plain, _ = sd3
    patcher = compiled(plain, scope=scope)
    load_whole(patcher)
    blocks = patcher.model.diffusion_model.joint_blocks
    wanted = predict(patcher, "sd3")
    calls: Counter[str] = Counter()

    def bring(block: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        calls["brought"] += 1
        for layer in block.modules():
            for name, weight in layer._parameters.items():
                if weight is not None:
                    layer._parameters[name] = torch.nn.Parameter(weight.clone(), requires_grad=False)

    def take(block: torch.nn.Module, args: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            calls["taken"] += 1

    handles = [block.register_forward_pre_hook(bring) for block in blocks]
    handles += [block.register_forward_hook(take, always_call=True) for block in blocks]
    with compiles(0):
        for _ in range(2):
            assert torch.equal(predict(patcher, "sd3"), wanted)
    assert set(calls.values()) == ({2 * len(blocks)} if scope == REGIONAL else set())
    torch._dynamo.reset()
    with compiles(2 if scope == REGIONAL else 1):  # with the hooks from the start
        for _ in range(2):
            assert torch.equal(predict(patcher, "sd3"), wanted)
    for handle in handles:
        handle.remove()
    with compiles(0 if scope == REGIONAL else 1):  # that they are there is part of what has been traced
        assert torch.equal(predict(patcher, "sd3"), wanted)


def test_lora_on_a_weight_that_comfyui_hands_over_decoded(sd15: Any, model: Any) -> None:
    """Where another node has a function on the weight, or dynamic VRAM meets a layer on the CPU."""
    from snug.nodes.adapter.compiled_layers import OpaqueConv, replaced_forwards

    plain, _ = sd15
    patched = model.with_lora(plain, model.make_lora(plain.model, 1))
    load_whole(patched)
    layer = next(
        layer for _, layer in model.packed_modules(patched.model) if isinstance(layer, torch.nn.Conv2d)
    )
    x = torch.randn(1, layer.in_channels, 8, 8)
    wanted = layer(x)
    layer.__dict__["weight_function"] = [lambda weight: weight * 1.0]
    assert torch.allclose(layer(x), wanted, atol=TOLERANCE)
    with replaced_forwards([OpaqueConv(layer)]):
        assert torch.allclose(layer(x), wanted, atol=TOLERANCE)
    layer.__dict__["weight_function"] = []
