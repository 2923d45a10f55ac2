"""Safetensors that Snug writes: its reader and each library find the same weights; files are whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.quantization import LayerInfo, make_recipe, product_targets, targets
from snug.quant_backends.quantization.calibration import LayerStatistics
from snug.quant_backends.readers.conventions import open_quantized_safetensors
from snug.quant_backends.readers.safetensors_file import SafetensorsFile
from snug.quant_backends.writers import CONVENTIONS, new_file, write_safetensors

Tensors = dict[str, PackedTensor | torch.Tensor]
SHAPES = {"a.0": (96, 256), "a.1": (40, 64), "b": (7, 192)}
# What the convention is called in `readers/conventions.py`.
READ_AS = {"comfy_quant": "snug", "scaled_fp8": "scaled-fp8", "torchao": "torchao", "quanto": "quanto"}
LIBRARY_TARGETS = [t for t in targets().values() if t.backend != "gguf" and not t.unavailable]


def quantized(target: str) -> Tensors:
    """Three layers without and with a bias, an odd one among them, and what is not quantized."""
    generator = torch.Generator().manual_seed(5)
    layers = [LayerInfo(name, shape) for name, shape in SHAPES.items()]
    recipe = make_recipe(target, layers, skip="")
    tensors: Tensors = {"scale_shift_table": torch.randn(3, 5, generator=generator)}
    for layer in layers:
        weight = (torch.randn(layer.shape, generator=generator) / 20).bfloat16()
        packed = recipe.quantize(layer, weight)
        tensors[f"{layer.name}.weight"] = weight if packed is None else packed
    tensors["a.0.bias"] = torch.randn(96, generator=generator).bfloat16()
    tensors["a.norm.weight"] = torch.randn(17, generator=generator)
    return tensors


def statistics(columns: int) -> LayerStatistics:
    """Inputs of which some channels are outliers."""
    absmax = torch.rand(columns, generator=torch.Generator().manual_seed(columns)) + 0.5
    absmax[::50] *= 30
    return LayerStatistics(absmax.square() / 4, absmax, torch.stack([-absmax.max() / 3, absmax.max()]), 100)


PRODUCTS = {
    "INT8 dynamic": ("comfy_quant", "snug"),
    "INT8 static": ("snug", "snug"),
    "FP8 dynamic": ("comfy_quant", "snug"),
    "FP8 static": ("comfy_quant", "snug"),
    "bitsandbytes LLM.int8": ("bitsandbytes", "bitsandbytes-int8"),
    "bitsandbytes LLM.int8 threshold 2.5": ("bitsandbytes", "bitsandbytes-int8"),
}


def products(target: str) -> Tensors:
    """As `quantized`; with static targets, b has not run and is dynamic."""
    layers = [LayerInfo(name, shape) for name, shape in SHAPES.items()]
    found = {layer.name: statistics(layer.shape[1]) for layer in layers if layer.name != "b"}
    recipe = make_recipe(target, layers, skip="", statistics=found)
    tensors = quantized("GGUF F16")
    generator = torch.Generator().manual_seed(5)
    for layer in layers:
        packed = recipe.quantize(layer, torch.randn(layer.shape, generator=generator) / 20)
        assert packed is not None
        tensors[f"{layer.name}.weight"] = packed
    return tensors


def test_every_product_target_is_tested() -> None:
    assert product_targets().keys() <= PRODUCTS.keys()


@pytest.mark.parametrize("target", PRODUCTS)
def test_products_are_written_and_read(target: str, tmp_path: Path) -> None:
    """Whatever is needed to multiply in 8 bits comes back, in the first convention that holds all of it."""
    tensors, path = products(target), tmp_path / "model.safetensors"
    convention, read_as = PRODUCTS[target]
    assert write_safetensors(path, tensors) == convention
    loaded = open_quantized_safetensors(path)
    assert loaded.convention.name == read_as and not loaded.convention.core
    assert loaded.state_dict.keys() == tensors.keys()
    for name, value in tensors.items():
        same(loaded.state_dict[name], value, name)
    if convention == "bitsandbytes":
        with safe_open(path, "pt") as file:
            found = by_bitsandbytes(load_file(path), file.metadata())
        for name, value in found.items():
            packed = tensors[name]
            assert isinstance(packed, PackedTensor)
            assert torch.equal(value, dequantize_packed(packed, value.dtype))


def convention_of(target: str) -> str:
    """The one that the target's library has; where several hold it, the library's."""
    backend = targets()[target].backend
    return backend if backend in CONVENTIONS else {"int8": "comfy_quant", "fp8": "scaled_fp8"}[backend]


def same(found: Any, expected: Any, name: str) -> None:
    if not isinstance(expected, PackedTensor):
        assert isinstance(found, torch.Tensor) and torch.equal(found, expected), name
        return
    assert isinstance(found, PackedTensor), name
    assert (found.format, found.shape) == (expected.format, expected.shape), name
    pairs = {"data": (found.data, expected.data)}
    pairs |= {part: (found.parts[part], expected.parts[part]) for part in expected.parts}
    for part, (ours, theirs) in pairs.items():
        assert ours.dtype == theirs.dtype, (name, part)
        assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)), (
            name,
            part,
        )


@pytest.mark.parametrize("target", LIBRARY_TARGETS, ids=lambda target: target.name)
def test_what_is_written_is_read(target, tmp_path: Path) -> None:
    tensors, path = quantized(target.name), tmp_path / "model.safetensors"
    convention = convention_of(target.name)
    found = write_safetensors(path, tensors, convention, metadata={"b": "2", "a": "é"})
    loaded = open_quantized_safetensors(path)
    assert found == convention and READ_AS.get(convention, "bitsandbytes") in loaded.convention.name
    assert loaded.metadata["b"] == "2" and loaded.metadata["a"] == "é"
    assert loaded.state_dict.keys() == tensors.keys()
    for name, value in tensors.items():
        same(loaded.state_dict[name], value, name)
    for info in SafetensorsFile(path).tensors.values():
        assert info.offset % info.dtype.itemsize == 0, "readers could not map it"
    with safe_open(path, "pt") as file:  # the safetensors library checks the header and finds no holes
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)
    assert [path.name] == [entry.name for entry in tmp_path.iterdir()]


@pytest.mark.parametrize("target", LIBRARY_TARGETS, ids=lambda target: target.name)
def test_the_library_finds_the_same_weights(target, tmp_path: Path) -> None:
    tensors, path = quantized(target.name), tmp_path / "model.safetensors"
    convention = convention_of(target.name)
    write_safetensors(path, tensors, convention)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    read = {"bitsandbytes": by_bitsandbytes, "torchao": by_torchao, "quanto": by_quanto}.get(convention)
    if read is None:
        pytest.skip("core ComfyUI reads it: tests/nodes/adapter")
    found = read(load_file(path), metadata)
    packed = {name: value for name, value in tensors.items() if isinstance(value, PackedTensor)}
    assert found.keys() == packed.keys() and packed
    for name, value in packed.items():
        expected = dequantize_packed(value, found[name].dtype)
        assert torch.equal(found[name], expected), name


def by_bitsandbytes(stored: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    functional = pytest.importorskip("bitsandbytes.functional")
    found = {}
    for name, value in stored.items():
        parts = {key: part for key, part in stored.items() if key.startswith(f"{name}.")}
        if any("quant_state" in key for key in parts):
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            found[name] = functional.dequantize_4bit(value, state)
        if name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = functional.int8_vectorwise_dequant(stored[weight], value)
    return found


def by_torchao(stored: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    found, left = support.unflatten_tensor_state_dict(stored, metadata)
    return {name: value.dequantize() for name, value in found.items() if hasattr(value, "qdata")}


def by_quanto(stored: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    quanto = pytest.importorskip("optimum.quanto")
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.ModuleDict(
                {
                    "0": torch.nn.Linear(256, 96),
                    "1": torch.nn.Linear(64, 40, bias=False),
                    "norm": torch.nn.LayerNorm(17, bias=False),
                }
            ),
            "b": torch.nn.Linear(192, 7, bias=False),
        }
    ).bfloat16()
    stored.pop("scale_shift_table")
    quanto.requantize(model, stored, json.loads(metadata["quantization_map"]))
    return {
        f"{name}.weight": getattr(layer, "weight").dequantize()  # noqa: B009
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), quanto.QTensor)
    }


def test_files_of_bitsandbytes_and_torchao_are_the_libraries_own(tmp_path: Path) -> None:
    """Names, dtypes, shapes and texts of a weight equal those that the libraries save."""
    from quantized_files import quantize_tensors

    weight = (torch.randn(96, 256, generator=torch.Generator().manual_seed(5)) / 20).bfloat16()
    kinds = {"nf4-nested": "bitsandbytes NF4 double", "fp4": "bitsandbytes FP4", "int8": "bitsandbytes INT8"}
    kinds |= {"torchao-int8": "torchao int8", "torchao-float8": "torchao float8"}
    for kind, target in kinds.items():
        theirs, described = quantize_tensors({"x.weight": weight}, kind)
        packed = make_recipe(target, [], skip="").quantize(LayerInfo("x", (96, 256)), weight)
        assert packed is not None
        write_safetensors(tmp_path / "ours.safetensors", {"x.weight": packed}, convention_of(target))
        save_file(
            {n: v.contiguous() for n, v in theirs.items()},
            tmp_path / "theirs.safetensors",
            metadata=described,
        )
        ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value.float(), theirs[name].float()), (kind, name)
            assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), (kind, name)
        with safe_open(tmp_path / "ours.safetensors", "pt") as file:
            assert (file.metadata() or {}) == described, kind


def test_the_convention_is_found_and_foreign_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.randn(8, 64)
    int8, q8 = (
        make_recipe("INT8 per row rotated", [], skip="").quantize(LayerInfo("x", (8, 64)), values),
        None,
    )
    assert write_safetensors(path, {"x.weight": int8} if int8 else {}) == "comfy_quant"
    q8 = quantize_packed(values, FORMATS["Q8_0"])
    with pytest.raises(SnugError, match="No convention .* Q8_0; save as GGUF"):
        write_safetensors(path, {"x.weight": q8})
    with pytest.raises(SnugError, match="x.weight is in Q8_0, which quanto does not hold; it holds qint8"):
        write_safetensors(path, {"x.weight": q8}, "quanto")
    with pytest.raises(SnugError, match="no convention 'gptq'; choose one of comfy_quant"):
        write_safetensors(path, {}, "gptq")
    half = quantize_packed(values, FORMATS["F16"])
    write_safetensors(path, {"x.weight": half})
    assert torch.equal(load_file(path)["x.weight"], values.half())


class Lazy(Mapping[str, torch.Tensor]):
    """Makes each tensor when it is asked for, once."""

    def __init__(self, count: int) -> None:
        self.asked: list[str] = []
        self.count = count

    def __getitem__(self, name: str) -> torch.Tensor:
        assert name not in self.asked, "a tensor was asked for twice"
        self.asked.append(name)
        return torch.full((1000, 101), float(name[1:]))

    def __iter__(self) -> Iterator[str]:
        return (f"t{number}" for number in range(self.count))

    def __len__(self) -> int:
        return self.count


def test_tensors_are_made_one_at_a_time_and_progress_is_told(tmp_path: Path) -> None:
    tensors, calls = Lazy(5), []
    write_safetensors(
        tmp_path / "x.safetensors",
        tensors,
        "quanto",
        expected_bytes=5 * 404000,
        progress=lambda done, total: calls.append((done, total, len(tensors.asked))),
    )
    assert calls == [(404000 * n, 5 * 404000, n) for n in range(1, 6)]
    assert load_file(tmp_path / "x.safetensors")["t3"][0, 0] == 3


@pytest.mark.parametrize("at", range(1, 11))
def test_stopping_leaves_the_old_file_and_nothing_else(at: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"old": torch.ones(3)})
    before = path.read_bytes()

    def stop(done: int, total: int) -> None:
        if done >= total * at / 10:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_safetensors(path, {f"t{n}": torch.ones(1000) for n in range(10)}, progress=stop)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_file.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10**6}))
    with pytest.raises(SnugError, match="needs 0.00 GB, but its disk has 0.00 GB free"):
        write_safetensors(tmp_path / "x.safetensors", {"t": torch.ones(10)})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "x.safetensors"
    code = f"""
import sys, time
sys.path.insert(0, {str(root / "scripts")!r})
from snug_path import register_snug
register_snug()
import torch
from snug.quant_backends.writers import write_safetensors
def wait(done, total):
    print("here", flush=True)
    time.sleep(60)
write_safetensors({str(path)!r}, {{"t": torch.ones(1000)}}, progress=wait)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    write_safetensors(path, {"t": torch.zeros(2)})
    assert len(list(tmp_path.iterdir())) == 2, "another process is still writing"
    process.kill()
    process.wait()
    time.sleep(0.05)
    write_safetensors(path, {"t": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["t"].shape == (3,)
