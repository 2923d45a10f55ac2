"""Quantizing any torch module: it runs, moves, copies, saves; what is delicate stays; the rest of it is untouched."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.quantization import load_packed, packed_state_dict, quantize_module, targets
from snug.quant_backends.quantization.packed_layers import PackedLinear, PackedWeight
from snug.quant_backends.readers.conventions import open_quantized_safetensors
from snug.quant_backends.writers import write_safetensors


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 64)
        self.conv = torch.nn.Conv1d(64, 64, 3, padding=1)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=number > 0) for number in range(3))
        self.norm = torch.nn.LayerNorm(64)
        self.proj_out = torch.nn.Linear(64, 32)
        self.attention = torch.nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = x + torch.nn.functional.silu(block(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.proj_out(self.norm(x))


IDS = torch.arange(10).view(2, 5) * 3


def network() -> Any:
    torch.manual_seed(1)
    return Network().eval()


@pytest.mark.parametrize(
    "target", ["INT8 per row rotated", "bitsandbytes NF4 double", "GGUF Q8_0", "quanto int4"]
)
def test_it_runs_with_the_decoded_weights(target: str) -> None:
    dense, module = network(), network()
    report = quantize_module(module, target, skip="", kinds=("linear", "conv", "embedding"))
    for name, layer in module.named_modules():
        if isinstance(layer, PackedWeight):
            dense.get_submodule(name).weight = torch.nn.Parameter(dequantize_packed(layer.packed))
    assert {"blocks.0", "blocks.1", "blocks.2", "proj_out"} <= report.quantized.keys()
    assert "attention.out_proj" not in {**report.quantized, **report.kept}, (
        "its owner looks at the weight itself"
    )
    torch.testing.assert_close(module(IDS), dense(IDS), rtol=1e-4, atol=1e-4)
    assert report.bytes_after < 0.6 * report.bytes_before and str(report).endswith("MB after")


def test_what_is_kept_and_why() -> None:
    module = network()
    report = quantize_module(module, "INT8 per row", skip="default, blocks.2", overrides={"blocks.0": ""})
    assert report.quantized == {"blocks.1": "int8-rows"}
    assert report.kept == {
        "embed": "kind",
        "conv": "kind",
        "blocks.0": "choice",
        "blocks.2": "blocks.2",
        "proj_out": "^proj_out$",
    }
    again = quantize_module(module, "FP8 e4m3fn per row", skip="")
    assert "blocks.1" not in again.quantized, "it is quantized already"


def test_it_moves_copies_and_changes_its_dtype() -> None:
    module: Any = network()
    quantize_module(module, "INT8 per row rotated", skip="")
    wanted = module(IDS)
    layer: Any = module.blocks[1]
    assert type(layer) is PackedLinear and issubclass(PackedLinear, torch.nn.Linear)
    twin = copy.deepcopy(module)
    half: Any = copy.deepcopy(module).to(torch.bfloat16)
    assert torch.equal(twin(IDS), wanted)
    assert (
        half.blocks[1].packed.parts["scale"].dtype == torch.float32
        and half.blocks[1].weight.dtype == torch.bfloat16
    )
    assert torch.equal(half.blocks[1].packed.data, layer.packed.data)
    assert (half(IDS) - wanted).norm() < 0.05 * wanted.norm()
    assert all(value.device.type == "meta" for value in module.to("meta").state_dict().values())


def test_shared_weights_stay_shared() -> None:
    module: Any = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    module[1].weight = module[0].weight
    quantize_module(module, "INT8 per row", skip="")
    assert module[0].packed.data.data_ptr() == module[1].packed.data.data_ptr()


@pytest.mark.parametrize(
    "target", ["INT8 per row", "bitsandbytes NF4", "torchao int8", "quanto int4", "FP8 e5m2 per row"]
)
def test_saved_and_loaded(target: str, tmp_path: Path) -> None:
    module, path = network(), tmp_path / "model.safetensors"
    quantize_module(module, target, skip="default")
    wanted = module(IDS)
    write_safetensors(path, packed_state_dict(module))
    torch.manual_seed(9)
    fresh: Any = Network().eval()
    load_packed(fresh, open_quantized_safetensors(path).state_dict)
    assert torch.equal(fresh(IDS), wanted)
    load_packed(fresh, packed_state_dict(module))  # over a quantized one
    assert torch.equal(fresh(IDS), wanted)
    state = module.state_dict()
    module.load_state_dict(state)
    assert torch.equal(module(IDS), wanted)
    assert load_file(path).keys()


def test_wrong_files_are_explained(tmp_path: Path) -> None:
    module = network()
    quantize_module(module, "INT8 per row", skip="default")
    state = packed_state_dict(module)
    with pytest.raises(SnugError, match="no layer for x.weight"):
        load_packed(network(), {"x.weight": state["blocks.0.weight"]})
    with pytest.raises(SnugError, match=r"shape \(64, 64\), but the module needs \(32, 64\)"):
        load_packed(network(), {"proj_out.weight": state["blocks.0.weight"]})
    with pytest.raises(SnugError, match="missing or foreign, norm.bias among them"):
        load_packed(network(), {name: value for name, value in state.items() if name != "norm.bias"})


def test_progress_can_stop() -> None:
    module, seen = network(), []

    def progress(done: int, total: int) -> None:
        seen.append(done / total)
        if len(seen) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quantize_module(module, "INT8 per row", skip="", progress=progress)
    assert seen == sorted(seen) and seen[-1] < 1
    module(IDS)


@pytest.fixture(scope="module")
def example(root: Path) -> Any:
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location(
        "quantize_diffusers", root / "examples" / "quantize_diffusers.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_of_the_example(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformer int8, text encoder float8, the last projection kept; saving and loading give the same image."""
    error = example.main()
    said = capsys.readouterr().out
    assert 0 < error < 0.05
    assert "layers to int8-rows" in said and "layers to float8_e4m3fn-rows" in said and "proj_out" in said
    assert "the same image" in said


def test_every_target_takes_a_diffusers_transformer(example: Any) -> None:
    """Not those that need rows of 128 and more."""
    torch.manual_seed(0)
    source = example.tiny_transformer()
    quantized = {}
    for target in targets().values():
        if not target.unavailable:
            report = quantize_module(copy.deepcopy(source), target)
            assert "proj_out" in report.kept and not any("norm" in name for name in report.quantized)
            quantized[target.name] = len(report.quantized)
    assert quantized["INT8 per row"] == quantized["bitsandbytes NF4"] == quantized["quanto int2"] > 10
