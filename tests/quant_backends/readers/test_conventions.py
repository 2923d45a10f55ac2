"""Files written by the quantization libraries themselves give the weights that those libraries see."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers.conventions import (
    LoadedSafetensors,
    load_quantized,
    open_quantized_safetensors,
)
from snug.quant_backends.readers.safetensors_file import SafetensorsFile

Opened = Callable[..., LoadedSafetensors]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

    def save_and_open(
        tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None, **options: Any
    ) -> LoadedSafetensors:
        path = tmp_path / "model.safetensors"
        library.save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)
        return open_quantized_safetensors(path, **options)

    return save_and_open


def decoded(loaded: LoadedSafetensors, name: str, dtype: torch.dtype) -> torch.Tensor:
    packed = loaded.state_dict[name]
    assert isinstance(packed, PackedTensor)
    return dequantize_packed(packed, dtype)


def model(dtype: torch.dtype, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 48, bias=bias), torch.nn.Linear(48, 32, bias=bias)).to(
        dtype
    )


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str, block: int, nested: bool, opened: Opened) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    values = torch.randn(6, 100).half()
    data, state = functional.quantize_4bit(
        values, quant_type=kind, blocksize=block, compress_statistics=nested
    )
    parts = {f"a.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    loaded = opened({"a.weight": data, "a.bias": torch.ones(6), **parts})
    assert loaded.convention.name == "bitsandbytes-4bit"
    assert loaded.state_dict.keys() == {"a.weight", "a.bias"}
    assert loaded.format_counts == {f"bnb-{kind}-{block}" + ("-nested-256" if nested else ""): 1, "F32": 1}
    assert torch.equal(decoded(loaded, "a.weight", torch.float16), functional.dequantize_4bit(data, state))


def test_bitsandbytes_int8(opened: Opened) -> None:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = library.nn.Linear8bitLt(96, 5, has_fp16_weights=False)
    values = torch.randn(5, 96).half()
    layer.weight = library.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    state = torch.nn.Sequential(layer.to("cpu")).state_dict()
    loaded = opened(state)
    expected = library.functional.int8_vectorwise_dequant(state["0.weight"], state["0.SCB"])
    assert loaded.convention.name == "bitsandbytes-int8"
    assert loaded.state_dict.keys() == {"0.weight", "0.bias"}
    assert torch.equal(decoded(loaded, "0.weight", torch.float32), expected)


def test_bitsandbytes_int8_in_another_order_is_refused(opened: Opened) -> None:
    tensors = {"a.weight": torch.zeros(2, 4, dtype=torch.int8), "a.SCB": torch.ones(2)}
    with pytest.raises(FileFormatError, match="GPU's own tile order .* save the model again"):
        opened(tensors | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(FileFormatError, match="tile order"):
        opened(tensors | {"a.weight_format": torch.tensor(2, dtype=torch.int32)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["qint2", "qint4", "qint8", "qfloat8", "qfloat8_e5m2"])
def test_quanto(kind: str, dtype: torch.dtype, opened: Opened) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    net = model(dtype)
    quanto.quantize(net, weights=quanto.qtypes[kind])
    quanto.freeze(net)
    loaded = opened(net.state_dict())
    assert loaded.convention.name == "quanto"
    assert loaded.state_dict.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert loaded.extras.keys() == {
        f"{layer}.{scale}_scale" for layer in (0, 1) for scale in ("input", "output")
    }
    for layer in (0, 1):
        found = decoded(loaded, f"{layer}.weight", dtype)
        assert torch.equal(found, net[layer].weight.dequantize())


def test_quanto_without_a_bias_needs_the_shape(opened: Opened) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    net = model(torch.float32, bias=False)
    quanto.quantize(net, weights=quanto.qint4)
    quanto.freeze(net)
    with pytest.raises(FileFormatError, match="the shape of '0.weight' is not in the file"):
        opened(net.state_dict())
    loaded = opened(net.state_dict(), shapes={"0.weight": (48, 256), "1.weight": (32, 48)})
    assert torch.equal(decoded(loaded, "0.weight", torch.float32), net[0].weight.dequantize())


INT4 = vars(torch)["int4"]  # a name that torch's own type hints leave out
TORCHAO = {
    "int8 rows": lambda ao: ao.Int8WeightOnlyConfig(set_inductor_config=False),
    "int8 groups": lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16), set_inductor_config=False),
    "float8": lambda ao: ao.Float8WeightOnlyConfig(set_inductor_config=False),
    "int4 groups": lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=ao.PerGroup(16)),
    "int4 rows": lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=ao.PerAxis(0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", TORCHAO)
def test_torchao(config: str, dtype: torch.dtype, opened: Opened) -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    net = model(dtype)
    ao.quantize_(net, TORCHAO[config](ao))
    loaded = opened(*support.flatten_tensor_state_dict(net.state_dict()))
    assert loaded.convention.name == "torchao"
    assert loaded.state_dict.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for layer in (0, 1):
        assert torch.equal(decoded(loaded, f"{layer}.weight", dtype), net[layer].weight.dequantize())


@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "NVFP4Tensor", "Int4Tensor"])
def test_torchao_layouts_of_one_kernel_are_refused(kind: str, opened: Opened) -> None:
    metadata = {"tensor_names": '["a.weight"]', "a.weight": json.dumps({"_type": kind, "_data": {}})}
    with pytest.raises(FileFormatError, match=f"torchao's '{kind}', a layout made for one kind of GPU"):
        opened({"a._weight_qdata": torch.zeros(2)}, metadata)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    "scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.rand(8, 1)], ids=["0-d", "1-d", "rows"]
)
@pytest.mark.parametrize("keys", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_fp8(keys: tuple[str, str], scale: torch.Tensor, dtype: torch.dtype, opened: Opened) -> None:
    weight = torch.randn(8, 16).to(dtype)
    tensors = {"a.weight": weight, f"a.{keys[0]}": scale, f"a.{keys[1]}": torch.tensor(2.0)}
    tensors |= {"b.weight": torch.ones(4, 4), f"b.{keys[0]}": torch.tensor(2.0)}
    loaded = opened(tensors | {"scaled_fp8": torch.empty(2, dtype=dtype)})
    assert loaded.convention.name == "scaled-fp8"
    assert loaded.state_dict.keys() == {"a.weight", "b.weight"}
    assert loaded.extras.keys() == {"scaled_fp8", f"a.{keys[1]}"}
    assert torch.equal(decoded(loaded, "a.weight", torch.float32), weight.float() * scale.float())
    plain = loaded.state_dict["b.weight"]
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, torch.full((4, 4), 2.0))


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((256, 384), (2, 3), (128, 128)),
        ((256, 384), (256, 3), (1, 128)),
        ((256, 96), (2, 1), (128, 96)),
        ((48, 64), (1, 64), (48, 1)),
    ],
)
@pytest.mark.parametrize("key", ["weight_scale_inv", "weight_scale", "scale_weight"])
def test_block_scaled_fp8(
    key: str, shape: tuple[int, int], grid: tuple[int, int], block: tuple[int, int], opened: Opened
) -> None:
    weight, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(grid)
    loaded = opened({"a.weight": weight, f"a.{key}": scale})
    assert loaded.convention.name == "scaled-fp8"
    assert loaded.format_counts == {f"float8_e4m3fn-{block[0]}x{block[1]}": 1}
    expected = weight.float() * scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(decoded(loaded, "a.weight", torch.float32), expected)


def test_blocks_cut_at_the_edge_follow_the_rest_of_the_file(opened: Opened) -> None:
    weight, scale = torch.randn(576, 128).to(torch.float8_e4m3fn), torch.rand(5, 1)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    with pytest.raises(
        FileFormatError, match="blocks of 'a.weight' are not certain: 5 x 1 scales for 576 x 128"
    ):
        opened(tensors)
    tensors |= {"b.weight": weight[:256].clone(), "b.weight_scale_inv": torch.rand(2, 1)}
    tensors |= {"c.weight": weight[:3].clone(), "c.weight_scale_inv": torch.rand(1, 1)}
    expected = weight.float() * scale.repeat_interleave(128, 0)[:576]
    assert torch.equal(decoded(opened(tensors), "a.weight", torch.float32), expected)


def test_blocks_that_do_not_fit_are_refused(opened: Opened) -> None:
    weight = torch.zeros(256, 256, dtype=torch.float8_e4m3fn)
    for grid in ((3, 2), (2, 300), (0, 2)):
        with pytest.raises(FileFormatError, match="blocks of 'a.weight' are not certain|needs 256 elements"):
            opened({"a.weight": weight, "a.weight_scale_inv": torch.ones(grid)})


def test_plain_files_stay_as_they_are(opened: Opened) -> None:
    loaded = opened({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2).to(torch.float8_e4m3fn)})
    assert (loaded.convention.name, loaded.convention.core) == ("plain", False)
    assert loaded.format_counts == {"F32": 1, "F8_E4M3": 1}


def core_file(format: str, in_metadata: bool) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """A weight in one of ComfyUI's own formats, described in the header or beside it."""
    tensors = {"a.weight": torch.ones(2, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.tensor(0.5)}
    if in_metadata:
        layers = {"format_version": "1.0", "layers": {"a": {"format": format}}}
        return tensors, {"_quantization_metadata": json.dumps(layers)}
    description = json.dumps({"format": format}).encode()
    return tensors | {"a.comfy_quant": torch.tensor(list(description), dtype=torch.uint8)}, None


@pytest.mark.parametrize("in_metadata", [True, False])
def test_formats_of_comfyui_alone_are_left_to_it(in_metadata: bool, opened: Opened) -> None:
    tensors, metadata = core_file("nvfp4", in_metadata)
    loaded = opened(tensors, metadata)
    assert loaded.convention.core and not loaded.convention.loaders
    assert loaded.convention.core_formats == {"nvfp4"}
    assert loaded.state_dict.keys() == tensors.keys()


@pytest.mark.parametrize("in_metadata", [True, False])
def test_float8_of_comfyui_can_be_read(in_metadata: bool, opened: Opened) -> None:
    loaded = opened(*core_file("float8_e4m3fn", in_metadata))
    assert loaded.convention.core and loaded.convention.loaders
    assert loaded.state_dict.keys() == {"a.weight"}
    assert torch.equal(decoded(loaded, "a.weight", torch.float32), torch.full((2, 4), 0.5))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": {"a": 1}}', '{"layers": {"a": {"format": 1}}}'])
def test_damaged_descriptions_of_comfyui_are_refused(text: str, opened: Opened) -> None:
    tensors = {"a.weight": torch.ones(2, 4)}
    with pytest.raises(FileFormatError, match="_quantization_metadata"):
        opened(tensors, {"_quantization_metadata": text})
    description = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(FileFormatError, match="a.comfy_quant"):
        opened(tensors | {"a.comfy_quant": description})


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("qweight", "wscales"), r"quantized with SVDQuant \(Nunchaku\), .* own kernels; load a GGUF"),
        (("qweight", "proj_down"), r"quantized with SVDQuant \(Nunchaku\)"),
        (("qweight", "qzeros", "g_idx", "scales"), "quantized with GPTQ, which Snug does not load"),
        (("qweight", "qzeros", "scales"), "quantized with AWQ, which Snug does not load"),
    ],
)
def test_what_is_refused(names: tuple[str, ...], sentence: str, opened: Opened) -> None:
    with pytest.raises(FileFormatError, match=sentence):
        opened({f"blocks.0.{name}": torch.zeros(2) for name in names})


NF4 = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quant_type": "fp4"}, "names another type than its key, nf4"),
        ({"shape": [2, -64]}, "has no possible shape"),
        ({"shape": None}, "has no possible shape"),
        ({"shape": [3, 64]}, "needs 96 elements of uint8 as its data, got 64"),
        ({"blocksize": "64"}, "has no possible block sizes"),
        ({"blocksize": 0}, "no scaled format called 'bnb-nf4-0'"),
        ({"blocksize": 63}, "even number of weights, got 63"),
        ({"nested_blocksize": 256}, "the tensor 'a.weight.nested_absmax' is missing"),
    ],
)
def test_an_inconsistent_quantization_state(changes: dict[str, Any], sentence: str, opened: Opened) -> None:
    state = torch.tensor(list(json.dumps(NF4 | changes).encode()), dtype=torch.uint8)
    tensors = {
        "a.weight": torch.zeros(64, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.ones(2),
        "a.weight.quant_map": torch.ones(16),
        "a.weight.quant_state.bitsandbytes__nf4": state,
    }
    with pytest.raises(FileFormatError, match=sentence):
        opened(tensors)


def test_scales_beside_plain_weights(tmp_path: Path) -> None:
    """Converters write them beside layers that they left as they were; a scale of 1 costs no memory."""
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    tensors = {"a.weight": weight, "b.weight": weight.clone(), "scaled_fp8": torch.zeros(0)}
    scales = {"a.scale_weight": torch.ones(()), "b.scale_weight": torch.full((), 2.0)}
    library.save_file(tensors | scales, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    found = load_quantized(file).state_dict
    assert isinstance(found["a.weight"], torch.Tensor) and isinstance(found["b.weight"], torch.Tensor)
    assert torch.equal(found["a.weight"], weight) and torch.equal(found["b.weight"], 2 * weight)
    assert found["a.weight"].data_ptr() == file.read("a.weight").data_ptr()


FLOAT8 = {"a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}
OWN = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.snug_scale": torch.ones(4)}
OWN |= {"a.snug_factor": torch.ones(8)}


@pytest.mark.parametrize(
    ("tensors", "kinds", "sentence"),
    [
        (FLOAT8, "[]", "does not say for each layer"),
        (FLOAT8, '{"a": 1}', "does not say for each layer"),
        (FLOAT8, "{", "is not valid JSON"),
        (FLOAT8, '{"b": "dynamic"}', "'b' is to be rounded as 'dynamic', which its weight is not made for"),
        (FLOAT8, '{"a": "smooth"}', "rounded as 'smooth'"),
        (FLOAT8, '{"a": "outliers 6"}', "rounded as 'outliers 6'"),
        (FLOAT8, '{"a": "static"}', "needs 1 elements of float32 as its step, got 0"),
        (FLOAT8 | {"a.weight_scale": torch.ones(4, 1)}, '{"a": "dynamic"}', "rounded as 'dynamic'"),
        (
            FLOAT8 | {"a.weight_scale": torch.ones(()).half()},
            '{"a": "dynamic"}',
            "needs 1 elements of float32",
        ),
        (OWN, '{"a": "static"}', "'a.snug_step' is missing"),
        (
            OWN | {"a.snug_factor": torch.ones(4)},
            '{"a": "smooth"}',
            "needs 8 elements of float32 as its factor",
        ),
        (OWN | {"a.weight": torch.ones(4, 8)}, '{"a": "smooth"}', "needs 32 elements of int8"),
        (OWN, '{"a": "outliers 6"}', "rounded as 'outliers 6'"),
    ],
)
def test_inconsistent_roundings_of_inputs(
    tensors: dict[str, torch.Tensor], kinds: str, sentence: str, opened: Opened
) -> None:
    opened(FLOAT8 | {"a.input_scale": torch.ones(1)}, {"snug_activations": '{"a": "static"}'})
    layers = {"layers": {"a": {"format": "snug_int8" if "a.snug_scale" in tensors else "float8_e4m3fn"}}}
    described = {"snug_activations": kinds, "_quantization_metadata": json.dumps(layers)}
    with pytest.raises(FileFormatError, match=sentence.replace("(", r"\(")):
        opened(tensors, described)
