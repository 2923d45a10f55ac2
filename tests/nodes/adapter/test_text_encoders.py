"""Conditioning from a GGUF text encoder equals that of the dense one through ComfyUI's own loader.

ComfyUI's text-model classes are built smaller than they are: their configurations are replaced by name, and its
detection, which looks at full sizes, is told the kind. Everything else is the ordinary way of a file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import (
    PROMPT,
    SmallT5,
    detect_as,
    encode,
    load_dense,
    load_packed,
    random_weights,
    sizes,
    text_only,
    tiny_sentencepiece,
    with_tokenizer,
)
from snug.quant_backends.core.errors import SnugError
from text_encoder_files import write_mmproj, write_text_encoder
from vocabularies import tekken, write_sentencepiece, write_tekken


@dataclass(frozen=True)
class Small:
    """A text encoder of reduced size. architecture: llama.cpp's. model, config: names in ComfyUI's llama module."""

    architecture: str
    clip_type: str
    model: str
    config: str
    sizes: dict[str, int]
    tokenizer_folder: str = "qwen25_tokenizer"
    format: str = "Q8_0"
    heads: tuple[int, int] = (8, 4)


SMALL = {
    "QWEN25_7B": Small("qwen2vl", "qwen_image", "Qwen25_7BVLI", "Qwen25_7BVLI_Config", sizes()),
    "QWEN25_3B": Small("qwen2vl", "omnigen2", "Qwen25_3B", "Qwen25_3BConfig", sizes(64), format="Q4_0"),
    "QWEN25_3B without vision": Small("qwen2", "omnigen2", "Qwen25_3B", "Qwen25_3BConfig", sizes(64)),
    "QWEN3_4B": Small("qwen3", "lumina2", "Qwen3_4B", "Qwen3_4BConfig", sizes(64), format="F16"),
    "QWEN3_06B": Small("qwen3", "stable_diffusion", "Qwen3_06B", "Qwen3_06BConfig", sizes(64)),
    "QWEN3_2B": Small("qwen3", "ovis", "Ovis25_2B", "Ovis25_2BConfig", sizes(64)),
    "QWEN3_8B": Small(  # Flux 2 Klein takes what comes out of layers 9, 18 and 27
        "qwen3", "flux2", "Qwen3_8B", "Qwen3_8BConfig", sizes(hidden=64, layers=28), heads=(8, 4)
    ),
    "LLAMA3_8": Small(
        "llama", "hidream", "Llama2", "Llama2Config", {**sizes(64), "vocab_size": 128256}, "llama_tokenizer"
    ),
}


@pytest.fixture(autouse=True)
def small_vision(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.text_encoders import qwen_vl

    tower = functools.partial(
        qwen_vl.Qwen2VLVisionTransformer, num_layers=2, intermediate_size=96, num_heads=4
    )

    def build(hidden_size: int, **options: Any) -> Any:
        return tower(hidden_size=128, **options)

    monkeypatch.setattr(qwen_vl, "Qwen2VLVisionTransformer", build)


@pytest.fixture
def make(
    comfy: Any, comfyui_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Path, Path, dict[str, torch.Tensor]]]:
    """make(kind) writes (GGUF, dense twin) and returns them with the weights."""
    from comfy.text_encoders import llama

    def write(kind: str) -> tuple[Path, Path, dict[str, torch.Tensor]]:
        small = SMALL[kind]
        folder = comfyui_path / "comfy" / "text_encoders" / small.tokenizer_folder
        if not any(folder.glob("*merges.txt")) and not (folder / "tokenizer.json").exists():
            pytest.skip(f"this ComfyUI has no {small.tokenizer_folder}")
        kind = kind.partition(" ")[0]
        needs(comfy, kind)
        config = functools.partial(getattr(llama, small.config), **small.sizes)
        monkeypatch.setattr(llama, small.config, config)
        detect_as(comfy, monkeypatch, kind)
        module = getattr(llama, small.model)({}, torch.float32, "meta", comfy.ops.manual_cast)
        weights = random_weights(module, small.format)
        dense = tmp_path / "dense.safetensors"
        save_file(weights, dense)
        path = tmp_path / "encoder.gguf"
        write_text_encoder(path, text_only(weights), small.architecture, small.format, small.heads)
        return path, dense, weights

    return write


def needs(comfy: Any, kind: str) -> None:
    if kind not in comfy.sd.TEModel.__members__:
        pytest.skip(f"this ComfyUI does not know {kind}")


@pytest.mark.parametrize("kind", SMALL)
def test_conditioning_equals_the_dense_twin(kind: str, make: Any, comfy: Any) -> None:
    path, dense, _ = make(kind)
    wanted = encode(load_dense(comfy, dense, SMALL[kind].clip_type))
    found = encode(load_packed(path, SMALL[kind].clip_type))
    assert wanted.isfinite().all() and wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_t5(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = SmallT5(monkeypatch).weights(comfy, umt5=False)
    detect_as(comfy, monkeypatch, "T5_XXL")
    dense = tmp_path / "dense.safetensors"
    save_file(weights, dense)
    path = write_text_encoder(tmp_path / "t5.gguf", weights, "t5encoder")
    prompt = "a (red:1.3) fox under the moon"
    wanted = encode(load_dense(comfy, dense, "chroma"), prompt)
    found = encode(load_packed(path, "chroma"), prompt)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_umt5(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_sentencepiece("unigram")
    small = SmallT5(monkeypatch)
    small.vocab_size = 512
    weights = small.weights(comfy, umt5=True)
    detect_as(comfy, monkeypatch, "T5_XXL")
    monkeypatch.setitem(kinds().KINDS, "T5_XXL", ("UMT5-XXL", ("wan",)))
    dense = tmp_path / "dense.safetensors"
    save_file(with_tokenizer(weights, model), dense)
    path = tmp_path / "umt5.gguf"
    write_text_encoder(
        path, weights, "t5encoder", setup=lambda writer: write_sentencepiece(writer, model, "unigram", 512)
    )
    reference, packed = load_dense(comfy, dense, "wan"), load_packed(path, "wan")
    assert packed.tokenize(PROMPT) == reference.tokenize(PROMPT)
    wanted = encode(reference)
    assert wanted.std() > 0.01
    torch.testing.assert_close(encode(packed), wanted, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class SmallGemma:
    architecture: str
    clip_type: str
    model: str


GEMMAS = {
    "GEMMA_2_2B": SmallGemma("gemma2", "lumina2", "Gemma2_2B"),
    "GEMMA_3_4B": SmallGemma("gemma3", "lumina2", "Gemma3_4B"),
    "GEMMA_3_12B": SmallGemma("gemma3", "ltxv", "Gemma3_12B"),
}


@pytest.mark.parametrize("kind", GEMMAS)
def test_gemma(kind: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from comfy.text_encoders import llama

    needs(comfy, kind)
    small, model = GEMMAS[kind], tiny_sentencepiece("bpe")
    config = getattr(llama, f"{small.model}_Config")
    vision = {**getattr(config, "vision_config", {}), "num_hidden_layers": 1, "intermediate_size": 64}
    monkeypatch.setattr(config, "vision_config", vision, raising=False)
    monkeypatch.setattr(
        llama,
        f"{small.model}_Config",
        functools.partial(config, **{**sizes(heads=(2, 1)), "vocab_size": 512}),
    )
    detect_as(comfy, monkeypatch, kind)
    module = getattr(llama, small.model)({}, torch.float32, "meta", comfy.ops.manual_cast)
    weights = {n: t for n, t in random_weights(module, "Q8_0").items() if n.startswith("model.")}
    for key in weights:
        if key.endswith("norm.weight"):  # on a grid that adding 1 does not leave
            weights[key] = (weights[key] * 16).round() / 64
    dense = tmp_path / "dense.safetensors"
    save_file(with_tokenizer(weights, model), dense)
    path = tmp_path / "gemma.gguf"
    write_text_encoder(
        path, weights, small.architecture, setup=lambda writer: write_sentencepiece(writer, model, "bpe", 512)
    )
    reference, packed = load_dense(comfy, dense, small.clip_type), load_packed(path, small.clip_type)
    assert packed.tokenize(PROMPT) == reference.tokenize(PROMPT)
    wanted = encode(reference)
    assert wanted.std() > 0.01
    torch.testing.assert_close(encode(packed), wanted, rtol=1e-4, atol=1e-4)


def kinds() -> Any:
    from snug.nodes.adapter import text_encoder_kinds

    return text_encoder_kinds


def image_prompt(clip: Any) -> torch.Tensor:
    image = torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(1))
    return encode(clip, "make it blue", images=[image])


@pytest.mark.parametrize("choice", ["auto", "named"])
def test_vision(choice: str, make: Any, comfy: Any, tmp_path: Path) -> None:
    """An image in the prompt gives the same conditioning, with the vision part found or chosen."""
    path, dense, weights = make("QWEN25_7B")
    vision = {n.removeprefix("visual."): t for n, t in weights.items() if n.startswith("visual.")}
    part = write_mmproj(tmp_path / "encoder-mmproj-F16.gguf", vision, "qwen2.5vl_merger")
    wanted = image_prompt(load_dense(comfy, dense, "qwen_image"))
    clip = load_packed(path, "qwen_image", **({} if choice == "auto" else {"mmproj": str(part)}))
    torch.testing.assert_close(image_prompt(clip), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_images_without_a_vision_part_are_refused(choice: str, make: Any) -> None:
    path, _, _ = make("QWEN25_7B")
    clip = load_packed(path, "qwen_image", mmproj=choice)
    assert encode(clip).isfinite().all()
    with pytest.raises(SnugError, match="loaded without its vision part.*mmproj"):
        image_prompt(clip)


MISTRALS = {
    "llama": ("MISTRAL3_24B", "Mistral3Small24B", "flux2", 32),
    "mistral3": ("MISTRAL3_24B", "Mistral3Small24B", "flux2", 32),
    "mistral3, pruned": ("MISTRAL3_24B_PRUNED_FLUX2", "Mistral3Small24B", "flux2", 30),
    "mistral3, 3B": ("MINISTRAL_3_3B", "Ministral3_3B", "stable_diffusion", 4),
}


@pytest.mark.parametrize("case", MISTRALS)
def test_mistral(case: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from comfy.text_encoders import llama

    kind, model, clip_type, layers = MISTRALS[case]
    architecture = case.partition(",")[0]
    needs(comfy, kind)
    shape = {**sizes(hidden=64, layers=layers, heads=(4, 2)), "vocab_size": 6400}
    config = functools.partial(getattr(llama, f"{model}Config"), **shape)

    def build(**options: Any) -> Any:  # ComfyUI passes the pruned model's number of layers
        return config(**{**options, "num_hidden_layers": layers})

    monkeypatch.setattr(llama, f"{model}Config", build)
    detect_as(comfy, monkeypatch, kind)
    module = getattr(llama, model)({}, torch.float32, "meta", comfy.ops.manual_cast)
    weights = random_weights(module, "Q8_0")
    vocabulary = torch.frombuffer(bytearray(json.dumps(tekken()).encode()), dtype=torch.uint8)
    dense = tmp_path / "dense.safetensors"
    save_file({**weights, "tekken_model": vocabulary}, dense)
    path = tmp_path / "mistral.gguf"
    write_text_encoder(
        path, weights, architecture, heads=(4, 2), setup=lambda writer: write_tekken(writer, 6400)
    )
    try:
        reference = load_dense(comfy, dense, clip_type)
    except TypeError as error:  # ComfyUI 0.3.75 with transformers 5
        for file in (path, dense):
            with pytest.raises(SnugError, match="cannot build the tokenizer of .*; update ComfyUI"):
                load_packed(file, clip_type)
        assert "MistralConverter" in str(error)
        return
    packed = load_packed(path, clip_type)
    prompt = "a red fox in the moonlight, née, 狐狸 🦊"
    assert packed.tokenize(prompt) == reference.tokenize(prompt)
    wanted = encode(reference, prompt)
    assert wanted.std() > 0.01
    torch.testing.assert_close(encode(packed, prompt), wanted, rtol=1e-3, atol=1e-3)


def test_qwen3_with_vision(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Qwen3-VL: text encoder and vision part in one state dict, as ComfyUI's detection needs them."""
    qwen3vl = pytest.importorskip("comfy.text_encoders.qwen3vl")
    small = functools.partial(qwen3vl.Qwen3VL_4BConfig, **sizes())
    tower = {"hidden_size": 128, "intermediate_size": 256, "depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    monkeypatch.setitem(qwen3vl.QWEN3VL_CONFIGS, "qwen3vl_4b", small)
    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", tower)
    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION_COMMON, "num_heads", 4)
    detect_as(comfy, monkeypatch, "QWEN3VL_4B")

    class Small(qwen3vl.Qwen3VL):
        model_type = "qwen3vl_4b"

    weights = random_weights(Small({}, torch.float32, "meta", comfy.ops.manual_cast), "Q8_0")
    vision = {name.removeprefix("visual."): t for name, t in weights.items() if name.startswith("visual.")}
    dense = tmp_path / "dense.safetensors"
    save_file(weights, dense)
    path = write_text_encoder(tmp_path / "qwen3vl.gguf", text_only(weights), "qwen3vl", heads=(8, 4))
    write_mmproj(tmp_path / "mmproj.gguf", vision, "qwen3vl_merger")
    reference, packed = load_dense(comfy, dense, "stable_diffusion"), load_packed(path, "stable_diffusion")
    wanted = image_prompt(reference)
    assert wanted.std() > 0.01
    torch.testing.assert_close(image_prompt(packed), wanted, rtol=1e-3, atol=1e-3)
