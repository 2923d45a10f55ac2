"""LTX-2's text encoder: a Gemma 3 12B and the projection to its diffusion model, each in a file of any kind.

The reference is ComfyUI's own loader with the same weights in plain files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from ltx2_encoders import SmallLTX2, save, small_ltx2
from quantized_files import dense_tensors, quantize_tensors
from safetensors.torch import save_file
from small_text_encoders import encode, with_tokenizer
from snug.quant_backends.core.errors import SnugError
from text_encoder_files import add, finish, write_text_encoder
from vocabularies import write_sentencepiece

PROMPT = "a red fox under the moon"
PROJECTIONS = ("single", "dual")


@pytest.fixture
def ltx2(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> SmallLTX2:
    return small_ltx2(comfy, monkeypatch)


@pytest.fixture
def gemma(ltx2: SmallLTX2, tmp_path: Path) -> Path:
    """As llama.cpp's converter writes it: without its vision part."""
    return write_text_encoder(
        tmp_path / "gemma.gguf",
        ltx2.gemma,
        "gemma3",
        setup=lambda writer: write_sentencepiece(writer, ltx2.spiece, "bpe", 512),
    )


@pytest.fixture
def whole_gemma(ltx2: SmallLTX2, tmp_path: Path) -> Path:
    return save(tmp_path / "gemma.safetensors", with_tokenizer({**ltx2.gemma, **ltx2.vision}, ltx2.spiece))


def dense(comfy: Any, *paths: Path) -> Any:
    kind = comfy.sd.CLIPType.LTXV
    return comfy.sd.load_clip(list(map(str, paths)), clip_type=kind, model_options={"dtype": torch.float32})


def reference(comfy: Any, *paths: Path) -> torch.Tensor:
    found = encode(dense(comfy, *paths), PROMPT)
    assert found.isfinite().all() and found.std() > 0.01
    return found


def load(*paths: Path, **options: Any) -> Any:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    return load_text_encoders(list(map(str, paths)), "ltxv", **options)


def formats(clip: Any) -> set[str]:
    from snug.nodes.adapter.packed_module import packed_modules

    return {layer.weight.params.format for _, layer in packed_modules(clip.cond_stage_model)}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gguf_beside_a_projection(
    projection: str, ltx2: SmallLTX2, gemma: Path, whole_gemma: Path, comfy: Any, tmp_path: Path
) -> None:
    """LTX-2's, which brings its connectors, and LTX-2.3's, in either order."""
    second = save(tmp_path / "projection.safetensors", ltx2.projection(projection))
    wanted = reference(comfy, whole_gemma, second)
    for paths in ((gemma, second), (second, gemma)):
        clip = load(*paths)
        assert "Q8_0" in formats(clip)
        assert torch.equal(encode(clip, PROMPT), wanted)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_projection_of_a_checkpoint(
    kind: str, projection: str, ltx2: SmallLTX2, gemma: Path, whole_gemma: Path, comfy: Any, tmp_path: Path
) -> None:
    """Whatever the diffusion model in it is quantized to."""
    weights = ltx2.projection(projection)
    twin = save(tmp_path / "projection.safetensors", weights)
    block = "model.diffusion_model.transformer_blocks.0.attn1.to_q"
    weights |= {
        f"{block}.weight": torch.zeros(8, 4, dtype=torch.uint8),
        f"{block}.weight_scale": torch.ones(8),
    }
    weights |= {"vae.decoder.conv_in.weight": torch.zeros(2, 2), "vocoder.conv_pre.weight": torch.zeros(2, 2)}
    if projection == "dual":  # connectors of more blocks, which ComfyUI keeps in the diffusion model
        connector = "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks"
        weights |= {f"{connector}.{n}.attn1.to_q.bias": torch.zeros(64) for n in range(3)}
    path = tmp_path / "checkpoint.safetensors"
    if kind == "fp8":
        weights[f"{block}.weight"] = torch.zeros(8, 4).to(torch.float8_e4m3fn)
    description = {"format": {"nvfp4": "nvfp4", "fp8": "float8_e4m3fn"}[kind]}
    save_file(weights, path, {"_quantization_metadata": json.dumps({"layers": {block: description}})})
    clip = load(gemma, path)
    assert torch.equal(encode(clip, PROMPT), reference(comfy, whole_gemma, twin))
    # The projection keeps its precision, as what is at the end of other text encoders does.
    quantized = formats(load(gemma, path, quantize="GGUF Q4_0"))
    assert quantized >= {"Q8_0", "BF16"} and ("Q4_0" in quantized) == (projection == "single")


@pytest.mark.parametrize("kind", ["nf4", "fp8", "int8"])
def test_quantized_safetensors(
    kind: str, ltx2: SmallLTX2, whole_gemma: Path, comfy: Any, tmp_path: Path
) -> None:
    """Gemma and projection alike."""
    paths, twins = [], []
    whole = with_tokenizer({**ltx2.gemma, **ltx2.vision}, ltx2.spiece)
    for name, weights in (("gemma", whole), ("projection", ltx2.projection("dual"))):
        tensors, metadata = quantize_tensors(
            {n: v.float() if v.is_floating_point() else v for n, v in weights.items()}, kind
        )
        path, twin = tmp_path / f"{name}-{kind}.safetensors", tmp_path / f"{name}-twin.safetensors"
        save_file({n: v.contiguous() for n, v in tensors.items()}, path, metadata=metadata)
        plain = dense_tensors(path)
        save_file({**plain, **{n: whole[n] for n in ("spiece_model",) if n in plain}}, twin)
        paths.append(path)
        twins.append(twin)
    clip = load(*paths)
    torch.testing.assert_close(encode(clip, PROMPT), reference(comfy, *twins), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("target", "projection"),
    [
        ("GGUF Q8_0", "single"),
        ("GGUF Q4_0", "dual"),
        ("bitsandbytes NF4", "single"),
        ("FP8 e4m3fn per row", "dual"),
    ],
)
def test_quantize_save_and_load(
    target: str,
    projection: str,
    ltx2: SmallLTX2,
    gemma: Path,
    whole_gemma: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import folder_paths
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    second = save(tmp_path / "projection.safetensors", ltx2.projection(projection))
    clip = quantize_clip(load(whole_gemma, second), QuantizeSettings(target, requantize=True))[0]
    wanted = encode(clip, PROMPT)
    paths = save_text_encoders(clip, SaveSettings("ltx2"))
    assert [path.name.partition("_0")[0] for path in paths] == ["ltx2_gemma3_12b", "ltx2_projection"]
    again = load(*paths)
    assert formats(again) >= formats(clip) and torch.equal(encode(again, PROMPT), wanted)


def test_projection_as_gguf(
    ltx2: SmallLTX2, gemma: Path, whole_gemma: Path, comfy: Any, tmp_path: Path
) -> None:
    """As any tool writes it that keeps names, whatever it calls the architecture."""
    writer = gguf.GGUFWriter(tmp_path / "projection.gguf", "anything")
    for name, tensor in ltx2.single.items():
        add(writer, name, tensor, "Q8_0")
    path = finish(writer, tmp_path / "projection.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    twin = {
        name: torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy()).view(
            ltx2.single[name].shape
        )
        for name, found in stored.items()
    }
    save_file(twin, tmp_path / "twin.safetensors")
    clip = load(gemma, path)
    assert torch.equal(encode(clip, PROMPT), reference(comfy, whole_gemma, tmp_path / "twin.safetensors"))


@pytest.mark.parametrize("converter", ["new", "first"])
def test_images(
    converter: str, ltx2: SmallLTX2, gemma: Path, whole_gemma: Path, comfy: Any, tmp_path: Path
) -> None:
    """With the vision part beside Gemma's GGUF, as nodes use it that write a prompt from an image."""
    second = save(tmp_path / "projection.safetensors", ltx2.projection("dual"))
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(3))
    options = {"image": image, "skip_template": False}
    wanted = encode(dense(comfy, whole_gemma, second), PROMPT, **options)
    without = load(gemma, second)
    with pytest.raises(SnugError, match="loaded without its vision part"):
        encode(without, PROMPT, **options)
    write_gemma_vision(tmp_path / "mmproj.gguf", ltx2.vision, converter)
    clip = load(gemma, second)
    torch.testing.assert_close(encode(clip, PROMPT, **options), wanted, rtol=1e-5, atol=1e-5)
    black = encode(clip, PROMPT, **{**options, "image": torch.zeros_like(image)})
    assert (black - wanted).std() > 0.01


def write_gemma_vision(path: Path, vision: dict[str, torch.Tensor], converter: str) -> None:
    """convert_hf_to_gguf.py's Gemma3VisionModel; "first": the names of the two layers as it used to write them."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 2)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_string("clip.projector_type", "gemma3")
    for name, tensor in vision.items():
        stem, _, suffix = name.replace("_weight", ".weight").rpartition(".")
        source = stem if stem.startswith("multi_modal_projector.") else f"vision_tower.{stem}"
        new = mapping.get_name(source)
        assert new is not None, name
        if converter == "first":
            parts = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
            head, _, part = new.rpartition(".")
            new = f"{head}.{parts[part]}" if part in parts else new
        tensor = tensor + 1 if "soft_emb_norm" in name else tensor
        is_half = "input_projection" in name
        add(writer, f"{new}.{suffix}", tensor, "F16" if is_half else "Q8_0")
    finish(writer, path)


def test_gemma_alone(ltx2: SmallLTX2, gemma: Path, whole_gemma: Path, comfy: Any) -> None:
    """For nodes that write text."""
    assert torch.equal(encode(load(gemma), PROMPT), reference(comfy, whole_gemma))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["projection"],
            "this is LTX-2's text projection, which is used beside a Gemma; choose both",
        ),
        (
            ["gemma", "other"],
            "Type ltxv takes a Gemma and LTX-2's text projection, got gemma.gguf and other.gguf",
        ),
    ],
)
def test_refused(names: list[str], message: str, ltx2: SmallLTX2, gemma: Path, tmp_path: Path) -> None:
    files = {"gemma": gemma, "other": tmp_path / "other.gguf"}
    files["other"].write_bytes(gemma.read_bytes())
    files["projection"] = save(tmp_path / "projection.safetensors", ltx2.projection("dual"))
    with pytest.raises(SnugError, match=message):
        load(*(files[name] for name in names))
