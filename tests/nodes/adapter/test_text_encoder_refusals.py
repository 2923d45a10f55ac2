"""Every wrong file and combination is refused in one sentence, before any weight is loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import tiny_sentencepiece
from text_encoder_files import add, finish, write_mmproj, write_text_encoder
from vocabularies import write_sentencepiece

Tensors = dict[str, torch.Tensor]
Make = Callable[[Path], Sequence[Path]]


@pytest.fixture(autouse=True)
def nothing_is_loaded(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("loaded before it was checked")

    for name in ("load_text_encoder_state_dicts", "load_clip"):
        monkeypatch.setattr(comfy.sd, name, fail)


def refusal(paths: Sequence[Path], clip_type: str, **options: Any) -> str:
    from snug.nodes.adapter.text_encoders import load_text_encoders
    from snug.quant_backends.core.errors import SnugError

    with pytest.raises(SnugError) as caught:
        load_text_encoders([str(path) for path in paths], clip_type, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 450
    return message


def zeros(*names: str) -> Tensors:
    return {name: torch.zeros(2, 2) for name in names}


def llama_cpp(name: str, tensors: Tensors, architecture: str) -> Make:
    def make(folder: Path) -> list[Path]:
        writer = gguf.GGUFWriter(folder / name, architecture)
        for key, tensor in tensors.items():
            add(writer, key, tensor, "F32")
        return [finish(writer, folder / name)]

    return make


def dense(name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> Make:
    def make(folder: Path) -> list[Path]:
        save_file(tensors, folder / name, metadata=metadata)
        return [folder / name]

    return make


def content(name: str, data: bytes) -> Make:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_bytes(data)
        return [folder / name]

    return make


def together(*makes: Make) -> Make:
    return lambda folder: [path for make in makes for path in make(folder)]


CLIP_L = dense("clip_l.safetensors", zeros("text_model.encoder.layers.0.mlp.fc1.weight"))
T5_WEIGHT = "encoder.block.0.layer.0.SelfAttention.k.weight"
QWEN = llama_cpp(
    "qwen.gguf",
    {
        "token_embd.weight": torch.zeros(64, 32),
        "blk.0.attn_k.weight": torch.zeros(512, 32),
        "blk.0.attn_k.bias": torch.zeros(512),
    },
    "qwen2vl",
)
LAYER = "text_model.encoder.layers.0.mlp.fc1"
CORE_NVFP4 = dense(
    "nvfp4.safetensors",
    {f"{LAYER}.weight": torch.zeros(2, 1, dtype=torch.uint8), f"{LAYER}.weight_scale": torch.ones(1)},
    {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "nvfp4"}}})},
)
HEADER_WITHOUT_DATA = json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
FLUX = zeros("double_blocks.0.img_attn.qkv.weight")
VAE = zeros("decoder.conv_in.weight", "encoder.conv_in.weight")
MMPROJ = llama_cpp("mmproj.gguf", {"v.blk.0.ln1.weight": torch.zeros(2)}, "clip")

REFUSED: dict[str, tuple[Make, str, tuple[str, ...]]] = {
    "wrong type, GGUF": (QWEN, "sd3", ("qwen.gguf: this is Qwen2.5-VL 7B", "choose type qwen_image")),
    "wrong type, safetensors": (CLIP_L, "wan", ("this is CLIP-L", "stable_diffusion")),
    "wrong partner": (together(CLIP_L, QWEN), "flux", ("this is Qwen2.5-VL 7B", "or another file")),
    "three for two": (
        together(CLIP_L, QWEN, dense("t5.safetensors", zeros(T5_WEIGHT))),
        "flux",
        ("Type flux takes 2 text encoder files, got 3",),
    ),
    "two for one": (together(CLIP_L, QWEN), "wan", ("Type wan takes 1 text encoder file, got 2",)),
    "one kind twice": (
        together(CLIP_L, dense("other.safetensors", zeros("text_model.encoder.layers.0.mlp.fc1.weight"))),
        "flux",
        ("Type flux takes CLIP-L and T5-XXL, got CLIP-L twice; choose one of each",),
    ),
    "five files": (
        together(
            CLIP_L,
            *(
                dense(f"{number}.safetensors", zeros("text_model.encoder.layers.0.mlp.fc1.weight"))
                for number in range(4)
            ),
        ),
        "hidream",
        ("Type hidream takes 1 or 2 or 4 text encoder files, got 5",),
    ),
    "one file twice": (together(CLIP_L, CLIP_L), "flux", ("clip_l.safetensors is chosen twice",)),
    "diffusion model, GGUF": (
        llama_cpp("flux.gguf", FLUX, "flux"),
        "flux",
        ("is a diffusion model (flux)", "Load Diffusion Model (Snug)"),
    ),
    "diffusion model, safetensors": (
        dense("flux.safetensors", FLUX),
        "stable_diffusion",
        ("is a diffusion model", "Load Diffusion Model (Snug)"),
    ),
    "video model": (
        dense("wan.safetensors", zeros("blocks.0.self_attn.q.weight", "patch_embedding.weight")),
        "wan",
        ("is a diffusion model",),
    ),
    "checkpoint": (
        dense(
            "sd.safetensors",
            zeros(
                "model.diffusion_model.out.2.weight",
                "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            ),
        ),
        "stable_diffusion",
        ("a whole checkpoint", "checkpoint loader"),
    ),
    "VAE, safetensors": (dense("vae.safetensors", VAE), "sd3", ("is a VAE", "VAE loader")),
    "VAE, GGUF": (llama_cpp("vae.gguf", VAE, "vae"), "sd3", ("is a VAE",)),
    "LoRA, safetensors": (
        dense(
            "lora.safetensors", zeros("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight")
        ),
        "stable_diffusion",
        ("is a LoRA", "LoRA loader"),
    ),
    "LoRA, GGUF": (
        llama_cpp("lora.gguf", zeros("blk.0.attn_q.weight.lora_a"), "llama"),
        "hidream",
        ("LoRA",),
    ),
    "LoKr": (dense("lokr.safetensors", zeros("lycoris_x.lokr_w1")), "sd3", ("is a LoRA",)),
    "mmproj as encoder": (MMPROJ, "qwen_image", ("choose the text encoder here and this file as mmproj",)),
    "pickle": (content("t5.safetensors", b"\x80\x02}q\x00."), "sd3", ("PyTorch pickle", "convert it")),
    "zipped pickle": (content("t5.safetensors", b"PK\x03\x04" + bytes(60)), "sd3", ("PyTorch pickle",)),
    "pickle called gguf": (content("t5.gguf", b"PK\x03\x04" + bytes(60)), "sd3", ("PyTorch",)),
    "GGUF called safetensors": (
        content("t5.safetensors", b"GGUF" + bytes(60)),
        "sd3",
        ("has GGUF version 0", "expected 2 or 3"),
    ),
    "truncated safetensors": (
        content("cut.safetensors", len(HEADER_WITHOUT_DATA).to_bytes(8, "little") + HEADER_WITHOUT_DATA),
        "sd3",
        ("ends at byte", "download"),
    ),
    "truncated GGUF": (content("cut.gguf", b"GGUF\x03\0\0\0\x05\0\0\0"), "sd3", ("cut.gguf", "download")),
    "empty": (content("t5.safetensors", b""), "sd3", ("is empty",)),
    "web page": (content("t5.safetensors", b"<!DOCTYPE html>"), "sd3", ("a web page",)),
    "SVDQuant": (
        dense("t5.safetensors", zeros(T5_WEIGHT, "a.qweight", "a.wscales")),
        "flux",
        ("SVDQuant (Nunchaku)", "load a GGUF"),
    ),
    "GPTQ": (dense("q.safetensors", zeros("a.qweight", "a.g_idx")), "flux", ("GPTQ", "load a GGUF")),
    "AWQ": (
        dense(
            "q.safetensors", zeros("model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.qzeros")
        ),
        "qwen_image",
        ("AWQ", "load a GGUF"),
    ),
    "format of ComfyUI's": (
        together(CORE_NVFP4, llama_cpp("t5.gguf", {T5_WEIGHT: torch.zeros(384, 32)}, "t5")),
        "sdxl",
        ("ByT5 small",),
    ),
    "format of ComfyUI's in CLIP": (
        CORE_NVFP4,
        "stable_diffusion",
        ("ComfyUI's own format nvfp4", "choose a GGUF or FP8 version"),
    ),
    "model that no ComfyUI knows": (
        llama_cpp("new.gguf", {"blk.0.attn_q.weight": torch.zeros(8, 8)}, "qwen3"),
        "lumina2",
        ("none of the text encoders that this ComfyUI knows", "update ComfyUI"),
    ),
    "unknown architecture": (
        llama_cpp("new.gguf", {"blk.0.attn_q.weight": torch.zeros(8, 8)}, "mamba"),
        "lumina2",
        ("has the architecture 'mamba'", "choose a text encoder that ComfyUI uses"),
    ),
    "architecture that is not read from GGUF": (
        llama_cpp("gpt-oss.gguf", {"blk.0.attn_q.weight": torch.zeros(8, 8)}, "gpt-oss"),
        "flux",
        ("the file is GPT-OSS, which is not loaded from GGUF files", "choose a .safetensors version"),
    ),
    "something else": (dense("x.safetensors", zeros("foo.weight")), "sd3", ("no text encoder",)),
    "no head count": (
        llama_cpp(
            "llama.gguf",
            {
                "blk.0.attn_q.weight": torch.zeros(32, 32),
                "blk.0.attn_k.weight": torch.zeros(32, 32),
                "blk.0.ffn_norm.weight": torch.zeros(32),
            },
            "llama",
        ),
        "hidream",
        ("'llama.attention.head_count' is missing", "another conversion"),
    ),
    "projection alone": (
        dense(
            "connectors.safetensors",
            zeros(
                "text_embedding_projection.aggregate_embed.weight",
                "model.diffusion_model.video_embeddings_connector.learnable_registers",
            ),
        ),
        "ltxv",
        ("this is LTX-2's text projection", "used beside a Gemma", "choose both, and type ltxv"),
    ),
    "projection of another model": (
        together(CLIP_L, dense("p.safetensors", zeros("text_embedding_projection.weight"))),
        "flux",
        ("p.safetensors: this is LTX-2's text projection", "type flux does not use"),
    ),
    "missing file": (lambda folder: [folder / "gone.safetensors"], "sd3", ("cannot be opened", "gone")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, clip_type, parts = REFUSED[case]
    message = refusal(make(tmp_path), clip_type)
    for part in parts:
        assert part in message


def test_mmproj_of_another_model(tmp_path: Path) -> None:
    weights = {"merger.mlp.2.weight": torch.zeros(48, 32), "blocks.0.norm1.weight": torch.zeros(32)}
    part = write_mmproj(tmp_path / "other.gguf", weights, "qwen2.5vl_merger")
    message = refusal(QWEN(tmp_path), "qwen_image", mmproj=str(part))
    assert "width 48" in message and "does not belong to qwen.gguf" in message
    message = refusal(CLIP_L(tmp_path), "stable_diffusion", mmproj=str(part))
    assert "belongs to a GGUF text encoder" in message


def test_text_encoder_as_mmproj(tmp_path: Path) -> None:
    (path,) = QWEN(tmp_path)
    message = refusal([path], "qwen_image", mmproj=str(path))
    assert "is not the vision part" in message and "choose the mmproj file" in message


def test_comfyuis_format_beside_gguf(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kind of text encoder that ComfyUI alone could load: the reason is the mix."""
    from snug.nodes.adapter import text_encoders

    monkeypatch.setattr(text_encoders, "UNSCALED_BY_CORE", ())
    clip = llama_cpp("clip_g.gguf", zeros("text_model.encoder.layers.30.mlp.fc1.weight"), "clip")
    known = hasattr(comfy.utils, "convert_old_quants")
    reason = "cannot be mixed with files that only Snug decodes" if known else "this ComfyUI does not know"
    assert f"own format nvfp4, which {reason}" in refusal(together(CORE_NVFP4, clip)(tmp_path), "sdxl")


def test_missing_sentencepiece(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter import text_encoder_kinds

    model = tiny_sentencepiece("unigram")
    monkeypatch.setitem(text_encoder_kinds.KINDS, "T5_BASE", ("UMT5-XXL", ("wan",)))
    weights = {
        "shared.weight": torch.zeros(512, 32),
        T5_WEIGHT: torch.zeros(32, 32),
    }
    path = write_text_encoder(
        tmp_path / "umt5.gguf",
        weights,
        "t5encoder",
        setup=lambda writer: write_sentencepiece(writer, model, "unigram", 512),
    )
    find_spec: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sentencepiece" else find_spec(name, *a)
    )
    assert "pip install sentencepiece" in refusal([path], "wan")
