"""Whole files through the diffusion loader: what stays packed, what becomes dense, what is refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers import GGUFFile, load_diffusion_gguf

gguf = pytest.importorskip("gguf")

ORIGINAL = "comfy.gguf.orig_shape."


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(np.float32)


def test_quantized_weights_stay_in_the_file(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf({"img_in.weight": (values(6, 64), "Q8_0")})
    loaded = load_diffusion_gguf(path)
    packed = loaded.state_dict["img_in.weight"]
    assert isinstance(packed, PackedTensor)
    assert (packed.format.name, packed.shape) == ("Q8_0", (6, 64))
    assert packed.data.numpy().tobytes() == GGUFFile(path).read("img_in.weight").numpy().tobytes()
    assert loaded.kind == "GGUF, architecture 'flux'"
    assert loaded.format_counts == {"Q8_0": 1}


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_plain_weights_are_ordinary_tensors(
    write_gguf: Callable[..., Path], stored: str, dtype: torch.dtype
) -> None:
    weight = values(4, 8, 3, 3)
    tensor = load_diffusion_gguf(write_gguf({"conv.weight": (weight, stored)})).state_dict["conv.weight"]
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, weight.shape)
    assert torch.equal(tensor, torch.from_numpy(weight).to(dtype))


@pytest.mark.parametrize("stored", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", ["norm.weight", "proj.bias", "scale", "x_pad_token"])
def test_vectors_become_float32(write_gguf: Callable[..., Path], name: str, stored: str) -> None:
    vector = values(64)
    path = write_gguf({name: (vector, stored)})
    tensor = load_diffusion_gguf(path).state_dict[name]
    expected = gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, gguf.GGMLQuantizationType[stored])
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.flatten().numpy(), expected)


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("scale_shift_table", (6, 64)), ("blocks.0.modulation", (1, 6, 64)), ("pos_embed", (1, 9, 64))],
)
def test_tables_become_float32(
    write_gguf: Callable[..., Path], name: str, shape: tuple[int, ...], stored: str
) -> None:
    table = values(*shape)
    path = write_gguf({name: (table.reshape(-1, 64), stored)})  # the leading 1 is lost
    tensor = load_diffusion_gguf(path).state_dict[name]
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, shape)
    torch.testing.assert_close(tensor, torch.from_numpy(table), atol=0.03, rtol=0.01)


def test_huge_tables_stay_half(write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.quant_backends.readers import diffusion_gguf

    monkeypatch.setattr(diffusion_gguf, "MAX_FLOAT32_ELEMENTS", 63)
    state = load_diffusion_gguf(
        write_gguf({"a": (values(2, 32), "F16"), "b": (values(2, 32), "Q8_0")})
    ).state_dict
    assert [getattr(state[name], "dtype", None) for name in "ab"] == [torch.float16, torch.float16]


@pytest.mark.parametrize("name", ["motion_encoder.dec.direction.weight", "blocks.0.block.ff_i.gate.weight"])
def test_weights_used_directly_become_dense(write_gguf: Callable[..., Path], name: str) -> None:
    tensor = load_diffusion_gguf(write_gguf({name: (values(4, 64), "Q8_0")})).state_dict[name]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32


def test_integer_buffers_stay(write_gguf: Callable[..., Path]) -> None:
    steps = np.arange(6, dtype=np.int32)
    tensor = load_diffusion_gguf(write_gguf({"steps": steps})).state_dict["steps"]
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32
    assert tensor.tolist() == steps.tolist()


@pytest.mark.parametrize("element", ["INT32", "INT64"])
def test_original_shape_of_a_quantized_convolution(write_gguf: Callable[..., Path], element: str) -> None:
    weight = values(32, 8, 3, 3)
    name = "input_blocks.1.0.in_layers.2.weight"
    path = write_gguf(
        {name: (weight.reshape(-1, 256), "Q4_0")}, {ORIGINAL + name: ("ARRAY", list(weight.shape), element)}
    )
    packed = load_diffusion_gguf(path).state_dict[name]
    assert isinstance(packed, PackedTensor) and packed.shape == weight.shape
    ours = dequantize_packed(packed)
    theirs = gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(ours.numpy(), theirs.reshape(weight.shape))


def test_five_dimensions_through_the_original_shape(write_gguf: Callable[..., Path]) -> None:
    weight = values(8, 4, 1, 2, 2)
    shape = ("ARRAY", list(weight.shape), "INT32")
    path = write_gguf(
        {"patch_embedding.weight": weight.reshape(8, -1)}, {ORIGINAL + "patch_embedding.weight": shape}
    )
    loaded = load_diffusion_gguf(path).state_dict["patch_embedding.weight"]
    assert isinstance(loaded, torch.Tensor) and torch.equal(loaded, torch.from_numpy(weight))


def test_five_dimensions_stored_as_they_are(write_gguf: Callable[..., Path]) -> None:
    weight = values(8, 4, 1, 2, 2)
    path = write_gguf({"patch_embedding.weight": weight})  # ComfyUI-GGUF's fix_5d_tensors.py
    loaded = load_diffusion_gguf(path).state_dict["patch_embedding.weight"]
    assert isinstance(loaded, torch.Tensor) and torch.equal(loaded, torch.from_numpy(weight))


def test_five_dimensions_folded(write_gguf: Callable[..., Path]) -> None:
    weight = values(8, 4, 1, 2, 2)
    path = write_gguf(
        {"patch_embedding.weight": weight.reshape(32, 1, 2, 2), "patch_embedding.bias": values(8)}
    )
    loaded = load_diffusion_gguf(path).state_dict["patch_embedding.weight"]
    assert isinstance(loaded, torch.Tensor) and torch.equal(loaded, torch.from_numpy(weight))


def test_original_shape_that_torch_cannot_hold(raw: Any, save: Callable[..., Path]) -> None:
    payload = struct.pack("<IQ3q", 11, 3, 0, 2**40, 2**40)
    path = save(raw().tensor("w.weight", dims=(0,)).pair(ORIGINAL + "w.weight", 9, payload))
    with pytest.raises(FileFormatError, match="does not describe its 0 elements"):
        load_diffusion_gguf(path)


@pytest.mark.parametrize(
    ("value_type", "value", "element"),
    [
        ("ARRAY", [4, 63], "INT32"),
        ("ARRAY", [-4, -64], "INT32"),
        ("ARRAY", [2**62, 2**62, 0], "INT64"),
        ("ARRAY", [4.0, 64.0], "FLOAT32"),
        ("ARRAY", ["4", "64"], "STRING"),
        ("INT32", 256, None),
    ],
)
def test_wrong_original_shape(
    write_gguf: Callable[..., Path], value_type: str, value: Any, element: str | None
) -> None:
    entry = (value_type, value) if element is None else (value_type, value, element)
    path = write_gguf({"w.weight": values(4, 64)}, {ORIGINAL + "w.weight": entry})
    with pytest.raises(
        FileFormatError, match="'w.weight' does not describe its 256 elements; .*faulty converter"
    ):
        load_diffusion_gguf(path)


def test_mixed_checkpoint_keeps_the_diffusion_part(write_gguf: Callable[..., Path]) -> None:
    prefix = "model.diffusion_model."
    weight = values(2, 4, 3, 3)
    path = write_gguf(
        {
            prefix + "input_blocks.0.0.weight": weight,
            "first_stage_model.decoder.conv_in.weight": weight,
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": weight,
        }
    )
    loaded = load_diffusion_gguf(path)
    assert list(loaded.state_dict) == ["input_blocks.0.0.weight"]
    assert loaded.format_counts == {"F32": 1}


def test_qk_norm_names(write_gguf: Callable[..., Path]) -> None:
    name = "double_blocks.0.img_attn.norm.key_norm."
    path = write_gguf({name + "scale": values(8)})
    assert list(load_diffusion_gguf(path).state_dict) == [name + "scale"]
    assert list(load_diffusion_gguf(path, qk_norm="weight").state_dict) == [name + "weight"]


def test_progress(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf({"a.weight": values(2, 8), "b.weight": values(4, 8)})
    calls: list[tuple[int, int]] = []
    load_diffusion_gguf(path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 192), (192, 192)]


def test_architecture_is_only_a_hint(raw: Any, save: Callable[..., Path]) -> None:
    file = raw().tensor("img_in.weight", dims=(4, 2))
    assert load_diffusion_gguf(save(file)).kind == "GGUF, architecture not named"
    number = file.pair("general.architecture", 4, bytes(4))
    assert load_diffusion_gguf(save(number)).kind == "GGUF, architecture not named"


TEXT_ENCODERS = [
    ["token_embd.weight", "blk.0.attn_q.weight"],
    ["enc.blk.0.attn_q.weight"],
    ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
]
OTHER_KINDS = [
    *(
        (names, {}, r"a text encoder \(llama\), .*models/text_encoders.*Load Text Encoders")
        for names in TEXT_ENCODERS
    ),
    (["v.blk.0.attn_q.weight", "mm.0.weight"], {}, r"vision part \(mmproj\).*models/text_encoders beside"),
    (["any.weight"], {"general.type": ("STRING", "mmproj")}, "vision part"),
    (["any.weight"], {"general.type": ("STRING", "clip-vision")}, "vision part"),
    (["any.weight"], {"general.type": ("STRING", "adapter")}, "a LoRA .*models/loras"),
    (["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"], {}, "a LoRA .*models/loras"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], {}, "a VAE .*models/vae"),
    (["first_stage_model.decoder.conv_in.weight"], {}, "a VAE .*models/vae"),
    (["conv1.weight", "encoder.conv1.weight", "decoder.conv1.weight"], {}, "a VAE .*models/vae"),
    (["cond_stage_model.x.weight"], {}, "no diffusion model; choose the file of the diffusion model"),
    ([], {}, "holds no tensors"),
]


@pytest.mark.parametrize(("names", "metadata", "message"), OTHER_KINDS)
def test_other_kinds_are_refused(
    write_gguf: Callable[..., Path], names: list[str], metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(dict.fromkeys(names, values(2, 2)), metadata, architecture="llama")
    with pytest.raises(FileFormatError, match=message) as caught:
        load_diffusion_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
