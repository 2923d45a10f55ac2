"""Text encoders in safetensors of every convention, written by the libraries themselves, alone and beside others.

The reference is the same weights dequantized, in a plain file, through ComfyUI's own loader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import KINDS, dense_tensors, quantize_tensors
from safetensors.torch import load_file, save_file
from small_text_encoders import SmallCLIP, SmallT5, detect_as, encode, load_dense, load_packed
from text_encoder_files import write_text_encoder

PROMPT = "a (red:1.3) fox under the moon"
Write = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def t5(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    detect_as(comfy, monkeypatch, "T5_XXL")
    return SmallT5(monkeypatch).weights(comfy, umt5=False)


@pytest.fixture
def clip_l(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    weights = SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json")
    weights.pop("text_projection.weight")
    return weights


def save(path: Path, weights: dict[str, torch.Tensor], kind: str) -> tuple[Path, Path]:
    """(file of the kind, plain twin in float32)."""
    tensors, metadata = quantize_tensors(weights, kind)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    twin = path.with_name(f"dense-{path.name}")
    save_file(dense_tensors(path), twin)
    return path, twin


def packed_formats(clip: Any) -> set[str]:
    from snug.nodes.adapter.packed_module import packed_modules

    return {module.weight.params.format for _, module in packed_modules(clip.cond_stage_model)}


@pytest.mark.parametrize("kind", KINDS)
def test_alone(kind: str, t5: dict[str, torch.Tensor], comfy: Any, tmp_path: Path) -> None:
    if kind == "quanto-int4":
        pytest.skip("T5 has no biases; test_quanto_groups_without_a_bias")
    path, twin = save(tmp_path / "t5.safetensors", t5, kind)
    clip = load_packed(path, "chroma")
    assert packed_formats(clip)
    wanted = encode(load_dense(comfy, twin, "chroma"), PROMPT)
    assert wanted.std() > 0.01
    torch.testing.assert_close(encode(clip, PROMPT), wanted, rtol=1e-4, atol=1e-4)


def test_quanto_groups_without_a_bias(t5: dict[str, torch.Tensor], comfy: Any, tmp_path: Path) -> None:
    """quanto's qint4 does not store shapes; the model's width gives them."""
    quanto = pytest.importorskip("optimum.quanto")
    tensors, shapes = {}, {}
    for name, weight in t5.items():
        if name.endswith((".q.weight", ".o.weight", ".wi_0.weight", ".wo.weight")):
            layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
            layer[0].weight = torch.nn.Parameter(weight)
            quanto.quantize(layer, weights=quanto.qint4)
            quanto.freeze(layer)
            stored = {
                name.removesuffix("weight") + key[2:]: value for key, value in layer.state_dict().items()
            }
            tensors.update({key: value.contiguous() for key, value in stored.items() if value.numel()})
            shapes[name] = tuple(weight.shape)
        else:
            tensors[name] = weight
    path, dense = tmp_path / "t5.safetensors", tmp_path / "dense.safetensors"
    save_file(tensors, path)
    save_file(dense_tensors(path, shapes), dense)
    clip = load_packed(path, "chroma")
    assert any(name.startswith("quanto-int4") for name in packed_formats(clip))
    wanted = encode(load_dense(comfy, dense, "chroma"), PROMPT)
    torch.testing.assert_close(encode(clip, PROMPT), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "plain fp8", "bf16"])
def test_beside_gguf(
    kind: str, t5: dict[str, torch.Tensor], clip_l: dict[str, torch.Tensor], comfy: Any, tmp_path: Path
) -> None:
    """Flux's pair: T5 as GGUF, CLIP-L in this convention."""
    from snug.nodes.adapter.text_encoders import load_text_encoders

    path = tmp_path / "clip_l.safetensors"
    dtype = {"plain fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}.get(kind)
    if dtype:
        stored = {name: value.to(dtype) for name, value in clip_l.items()}
        twin = tmp_path / "dense.safetensors"
        save_file(stored, path)
        save_file({name: value.float() for name, value in stored.items()}, twin)
    else:
        path, twin = save(path, clip_l, kind)
    dense_t5 = tmp_path / "t5.safetensors"
    save_file(t5, dense_t5)
    gguf = write_text_encoder(tmp_path / "t5.gguf", t5, "t5encoder")
    clip = load_text_encoders([str(path), str(gguf)], "flux")
    reference = comfy.sd.load_clip(
        [str(twin), str(dense_t5)], clip_type=comfy.sd.CLIPType.FLUX, model_options={"dtype": torch.float32}
    )
    assert len(packed_formats(clip)) >= 2 and "Q8_0" in packed_formats(clip)
    tokens = clip.tokenize(PROMPT)
    found, wanted = (c.encode_from_tokens(tokens, return_pooled=True) for c in (clip, reference))
    assert wanted[1].std() > 0.01
    for value, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-3, atol=1e-3)


def as_core_writes(
    tensors: dict[str, torch.Tensor], form: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Old scaled FP8 tensors in ComfyUI's newer form: layers described in the header or beside the weights."""
    renamed = {
        name.replace(".scale_weight", ".weight_scale"): value
        for name, value in tensors.items()
        if name != "scaled_fp8"
    }
    layers = [name.removesuffix(".weight_scale") for name in renamed if name.endswith(".weight_scale")]
    description = {"format": "float8_e4m3fn"}
    if form == "header":
        found = {"format_version": "1.0", "layers": dict.fromkeys(layers, description)}
        return renamed, {"_quantization_metadata": json.dumps(found)}
    text = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    return renamed | {f"{layer}.comfy_quant": text.clone() for layer in layers}, {}


@pytest.mark.parametrize("form", ["header", "layers"])
@pytest.mark.parametrize("encoder", ["t5", "clip_l"])
def test_comfyuis_own_float8(
    form: str,
    encoder: str,
    request: pytest.FixtureRequest,
    comfy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone: by ComfyUI where it looks for scales in this kind of text encoder, else by Snug."""
    monkeypatch.setitem(
        SmallT5.sizes, "num_layers", 24
    )  # by its last block ComfyUI finds T5's quantized layers
    weights = request.getfixturevalue(encoder)
    clip_type = {"t5": "chroma", "clip_l": "stable_diffusion"}[encoder]
    old, twin = save(tmp_path / "old.safetensors", weights, "fp8")
    tensors, metadata = as_core_writes(load_file(old), form)
    path = tmp_path / "core.safetensors"
    save_file(tensors, path, metadata=metadata)
    clip = load_packed(path, clip_type)
    is_core = encoder == "t5" and hasattr(comfy.utils, "convert_old_quants")
    assert bool(packed_formats(clip)) != is_core
    wanted = encode(load_dense(comfy, twin, clip_type), PROMPT)
    torch.testing.assert_close(encode(clip, PROMPT), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", ["header", "layers"])
def test_comfyuis_own_float8_beside_gguf(
    form: str, t5: dict[str, torch.Tensor], clip_l: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    old, _ = save(tmp_path / "old.safetensors", t5, "fp8")
    tensors, metadata = as_core_writes(load_file(old), form)
    new = tmp_path / "core.safetensors"
    save_file(tensors, new, metadata=metadata)
    nf4, _ = save(tmp_path / "clip_l.safetensors", clip_l, "nf4")
    clips = [load_text_encoders([str(path), str(nf4)], "flux") for path in (old, new)]
    assert packed_formats(clips[1]) == {"float8_e4m3fn-tensor", *packed_formats(load_packed(nf4, "sd3"))}
    found = [clip.encode_from_tokens(clip.tokenize(PROMPT)) for clip in clips]
    assert torch.equal(found[0], found[1])


def test_weights_are_not_copied(t5: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from snug.quant_backends.readers import open_text_encoder_safetensors

    path = tmp_path / "t5.safetensors"
    save_file({name: tensor.half() for name, tensor in t5.items()}, path)
    file = open_text_encoder_safetensors(path)
    begin = file.file._bytes.obj  # pyright: ignore[reportAttributeAccessIssue]
    start = torch.frombuffer(begin, dtype=torch.uint8).data_ptr()
    for name, tensor in file.state_dict().items():
        if name.endswith(".weight") and len(tensor.shape) == 2 and "relative_attention_bias" not in name:
            place = tensor.data.data_ptr() - start
            assert 0 <= place < path.stat().st_size, name


def test_lora_on_scaled_fp8(t5: dict[str, torch.Tensor], comfy: Any, tmp_path: Path) -> None:
    """A LoRA on the packed encoder changes the conditioning as on the dense twin."""
    path, twin = save(tmp_path / "t5.safetensors", t5, "fp8")
    changes = []
    for clip in (load_packed(path, "chroma"), load_dense(comfy, twin, "chroma")):
        generator = torch.Generator().manual_seed(5)
        before, lora = encode(clip, PROMPT), {}
        for name, value in clip.cond_stage_model.state_dict().items():
            if name.endswith(("SelfAttention.q.weight", "wo.weight")):
                stem, (rows, columns) = f"text_encoders.{name.removesuffix('.weight')}", value.shape
                lora[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
                lora[f"{stem}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.3
        _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.8)
        changes.append(encode(patched, PROMPT) - before)
    assert changes[1].norm() > 0.05 * before.norm()
    assert (changes[0] - changes[1]).norm() < 0.001 * changes[1].norm()
