"""LoRA files of every kind change packed and dense models as core's loader does with the safetensors file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from lora_files import Factors, generic_names, random_factors, write_adapter
from safetensors.torch import save_file
from small_text_encoders import SmallT5, detect_as, encode, load_dense, load_packed, random_weights, sizes
from text_encoder_files import add, finish, gguf_names, permute, snap, write_text_encoder

TOLERANCE = 0.01  # of the change that the LoRA makes


@pytest.fixture
def apply(comfy: Any) -> Callable[..., tuple[Any, Any]]:
    from snug.nodes.adapter.loras import apply_lora

    return apply_lora


def layers_of(patcher: Any) -> dict[str, tuple[int, ...]]:
    """The matrices in numbered blocks, by name without "diffusion_model." and ".weight"."""
    found = {}
    for name, value in patcher.model.state_dict().items():
        if name.endswith(".weight") and len(value.shape) == 2 and "blocks." in name:
            found[name.removeprefix("diffusion_model.").removesuffix(".weight")] = tuple(value.shape)
    return found


def change(before: Any, after: Any, model: Any) -> torch.Tensor:
    return model.run(after, load=True) - model.run(before, load=True)


def wanted_change(
    patcher: Any, lora: dict[str, torch.Tensor], folder: Path, strength: float, model: Any
) -> Any:
    """What core's loader makes of the same LoRA as a safetensors file, on the dense model."""
    import comfy.sd
    import comfy.utils

    save_file(lora, folder / "reference.safetensors")
    loaded = comfy.utils.load_torch_file(str(folder / "reference.safetensors"), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, loaded, strength, 0)
    wanted = change(patcher, patched, model)
    assert wanted.abs().max() > 0.05
    return wanted


def snapped(factors: Factors, format: str) -> Factors:
    if format == "F32":
        return factors
    return {layer: (snap(down, format), snap(up, format)) for layer, (down, up) in factors.items()}


@pytest.mark.parametrize(
    "format,suffix,alpha", [("F32", ".weight", 0.0), ("F16", "", 7.0), ("Q8_0", ".weight", 7.0)]
)
def test_gguf_on_packed_and_dense(
    format: str, suffix: str, alpha: float, sd3: Any, apply: Any, model: Any, tmp_path: Path
) -> None:
    packed, dense = sd3
    factors = snapped(random_factors(layers_of(packed)), format)
    path = write_adapter(tmp_path / "lora.gguf", factors, "sd3", format, alpha, suffix)
    wanted = wanted_change(dense, generic_names(factors, "diffusion_model.", alpha), tmp_path, 0.8, model)
    for patcher in (packed, dense):
        patched, clip = apply(patcher, None, str(path), 0.8, 1.0)
        assert clip is None
        assert model.relative_error(change(patcher, patched, model), wanted) < TOLERANCE


def test_gguf_with_the_names_of_a_trainer(sd3: Any, apply: Any, model: Any, tmp_path: Path) -> None:
    """Some tools only put the tensors of a safetensors LoRA into a GGUF file."""
    factors = snapped(random_factors(layers_of(sd3[0])), "Q8_0")
    lora = {}
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "sd3")
    for layer, (down, up) in factors.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        lora |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor([9.0]),
        }
    for name, tensor in lora.items():
        add(writer, name, tensor, "Q8_0")
    finish(writer, tmp_path / "lora.gguf")
    wanted = wanted_change(sd3[1], lora, tmp_path, 1.0, model)
    patched, _ = apply(sd3[0], None, str(tmp_path / "lora.gguf"), 1.0, 0.0)
    assert model.relative_error(change(sd3[0], patched, model), wanted) < TOLERANCE


def test_safetensors(sd15: Any, apply: Any, model: Any, tmp_path: Path, caplog: Any) -> None:
    """Convolutions included; the log counts what has changed."""
    packed, dense = sd15
    lora = model.make_lora(packed.model, 1)
    wanted = wanted_change(dense, lora, tmp_path, 0.6, model)
    with caplog.at_level(logging.INFO, "snug"):
        patched, _ = apply(packed, None, str(tmp_path / "reference.safetensors"), 0.6, 1.0)
    assert model.relative_error(change(packed, patched, model), wanted) < TOLERANCE
    assert f"changes {len(lora) // 2} weights of the model" in caplog.text
    assert apply(packed, None, str(tmp_path / "reference.safetensors"), 0, 0) == (packed, None)


# ---- text encoders --------------------------------------------------------------------------------------------


def check_encoder(
    clips: tuple[Any, Any],
    weights: dict[str, Any],
    architecture: str,
    apply: Any,
    folder: Path,
    heads: Any = None,
) -> None:
    """clips: (packed, dense). The LoRA for every matrix, under llama.cpp's names."""
    import comfy.sd

    matrices = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in weights.items()
        if name.endswith(".weight") and value.dim() == 2 and "relative_attention" not in name
    }
    factors = random_factors(matrices)
    stored_names = gguf_names([f"{name}.weight" for name in matrices], architecture)
    stored = {}
    for layer, (down, up) in factors.items():
        if layer in ("shared", "model.embed_tokens"):
            down, up = (
                up,
                down.T,
            )  # of rank x vocabulary and hidden x rank, as PEFT keeps it, the first transposed
        if heads and layer.endswith(("q_proj", "k_proj")):
            up = permute(up, heads[layer.endswith("k_proj")])
        stored[stored_names[f"{layer}.weight"].removesuffix(".weight")] = (down, up)
    path = write_adapter(folder / "lora.gguf", stored, architecture, alpha=16.0)
    changes = []
    for clip, use_core in zip(clips, (False, True), strict=True):
        before = encode(clip)
        if use_core:
            prefix = next(name for name in clip.cond_stage_model.state_dict() if ".transformer." in name)
            prefix = f"text_encoders.{prefix.partition('.transformer.')[0]}.transformer."
            _, patched = comfy.sd.load_lora_for_models(
                None, clip, generic_names(factors, prefix, 16.0), 0, 0.8
            )
            assert len(patched.patcher.patches) == len(factors)
        else:
            _, patched = apply(None, clip, str(path), 1.0, 0.8)
        changes.append(encode(patched) - before)
    assert changes[1].norm() > 0.05 * before.norm()
    assert (changes[0] - changes[1]).norm() < 0.001 * changes[1].norm()


def test_t5(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apply: Any) -> None:
    weights = SmallT5(monkeypatch).weights(comfy, umt5=False)
    detect_as(comfy, monkeypatch, "T5_XXL")
    save_file(weights, tmp_path / "dense.safetensors")
    path = write_text_encoder(tmp_path / "t5.gguf", weights, "t5encoder")
    clips = load_packed(path, "chroma"), load_dense(comfy, tmp_path / "dense.safetensors", "chroma")
    check_encoder(clips, weights, "t5encoder", apply, tmp_path)


def test_llama(
    comfy: Any, comfyui_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apply: Any
) -> None:
    """Its query and key rows are in llama.cpp's order, and only the connected encoder knows the heads."""
    from comfy.text_encoders import llama

    if not (comfyui_path / "comfy" / "text_encoders" / "llama_tokenizer" / "tokenizer.json").exists():
        pytest.skip("this ComfyUI has no llama_tokenizer")
    shape = {**sizes(), "vocab_size": 128256}
    monkeypatch.setattr(llama, "Llama2Config", functools.partial(llama.Llama2Config, **shape))
    detect_as(comfy, monkeypatch, "LLAMA3_8")
    module = llama.Llama2({}, torch.float32, "meta", comfy.ops.manual_cast)
    weights = random_weights(module, "Q8_0")
    save_file(weights, tmp_path / "dense.safetensors")
    path = write_text_encoder(tmp_path / "llama.gguf", weights, "llama", heads=(8, 4))
    clips = load_packed(path, "hidream"), load_dense(comfy, tmp_path / "dense.safetensors", "hidream")
    weights.pop("lm_head.weight", None)
    check_encoder(clips, weights, "llama", apply, tmp_path, heads=(8, 4))


# ---- what does not fit ----------------------------------------------------------------------------------------


def other_lora(path: Path, layer: str, shape: tuple[int, int] = (64, 48)) -> str:
    save_file(generic_names(random_factors({layer: shape}), ""), path)
    return str(path)


@pytest.mark.parametrize(
    "layer,made_for",
    [
        ("transformer.single_transformer_blocks.0.attn.to_k", "Flux or HunyuanVideo"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", None),
        ("diffusion_model.blocks.0.self_attn.q", "Wan or Cosmos"),
        ("transformer.transformer_blocks.0.img_mlp.net.2", "Qwen-Image"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", None),
        ("something", None),
    ],
)
def test_nothing_fits(layer: str, made_for: str | None, sd3: Any, apply: Any, tmp_path: Path) -> None:
    from snug.quant_backends.core.errors import FileFormatError

    path = other_lora(tmp_path / "other.safetensors", layer)
    with pytest.raises(FileFormatError) as caught:
        apply(sd3[0], None, path, 1.0, 1.0)
    message = str(caught.value)
    assert "other.safetensors" in message and "\n" not in message
    if layer.startswith("text_encoder"):
        assert "only the text encoder; connect clip" in message
    else:
        assert "fits none of the layers of this model (SD3)" in message
        assert (f"made for {made_for}" in message) == (made_for is not None)
    assert sd3[0].patches == {}


def test_same_names_and_other_sizes(sd15: Any, apply: Any, tmp_path: Path) -> None:
    """A LoRA for SDXL finds layers of these names in SD 1.5."""
    from snug.quant_backends.core.errors import FileFormatError

    layer = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    factors = random_factors({layer: (640, 2048)})[layer]
    path = tmp_path / "sdxl.safetensors"
    save_file({f"{layer}.lora_down.weight": factors[0], f"{layer}.lora_up.weight": factors[1]}, path)
    with pytest.raises(FileFormatError, match=r"fits none of the layers.*made for SDXL"):
        apply(sd15[0], None, str(path), 1.0, 1.0)


def test_layers_of_another_size_are_reported(sd3: Any, apply: Any, tmp_path: Path, caplog: Any) -> None:
    shapes = layers_of(sd3[0])
    first, second = list(shapes)[:2]
    lora = generic_names(random_factors({first: shapes[first], second: (8, 8)}), "diffusion_model.")
    save_file(lora, tmp_path / "half.safetensors")
    apply(sd3[0], None, str(tmp_path / "half.safetensors"), 1.0, 1.0)
    assert "half.safetensors: 1 of its layers have another size" in caplog.text


def test_a_replaced_file_is_read_again(sd3: Any, apply: Any, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.gguf"
    outputs = []
    for seed, rank in ((1, 32), (2, 64)):
        (tmp_path / "new.gguf").unlink(missing_ok=True)
        write_adapter(tmp_path / "new.gguf", random_factors(layers_of(sd3[0]), seed, rank), "sd3")
        (tmp_path / "new.gguf").replace(path)
        outputs.append(model.run(apply(sd3[0], None, str(path), 1.0, 1.0)[0], load=True))
    assert model.relative_error(*outputs) > 0.05


def test_refusals(sd3: Any, twins: Any, apply: Any, tmp_path: Path) -> None:
    from snug.quant_backends.core.errors import SnugError

    path = tmp_path / "bad.safetensors"
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: torch.save({"a": torch.zeros(4)}, path), "PyTorch pickle"),
        (lambda: path.write_bytes(b"\x80\x02}q\x00."), "PyTorch pickle"),
        (
            lambda: save_file({"model.diffusion_model.a.weight": torch.zeros(4)}, path),
            "whole checkpoint.*Load Checkpoint",
        ),
        (lambda: save_file({"double_blocks.0.weight": torch.zeros(4)}, path), "holds no LoRA"),
        (lambda: save_file({"a.qweight": torch.zeros(4), "a.wscales": torch.zeros(4)}, path), "SVDQuant"),
        (lambda: path.write_bytes(path.read_bytes()[:-8]), "ends at byte"),
    ]
    for write, expected in cases:
        write()
        with pytest.raises(SnugError, match=rf"bad\.safetensors: .*{expected}"):
            apply(sd3[0], None, str(path), 1.0, 1.0)
    model_file = twins("sd3", "Q4_0").gguf
    with pytest.raises(SnugError, match="holds no LoRA"):
        apply(sd3[0], None, str(model_file), 1.0, 1.0)
    factors = random_factors({"blk.0.attn_q": (8, 8)})
    other = write_adapter(tmp_path / "other.gguf", factors, "llama", kind="alora")
    with pytest.raises(SnugError, match="adapter of the kind 'alora'"):
        apply(sd3[0], None, str(other), 1.0, 1.0)
    with pytest.raises(SnugError, match="connect a model, a clip, or both"):
        apply(None, None, str(other), 1.0, 1.0)
