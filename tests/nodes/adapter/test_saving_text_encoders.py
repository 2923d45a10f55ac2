"""Text encoders saved as GGUF load again with the same weights, tokens and conditioning, whatever their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import (
    PROMPT,
    SmallCLIP,
    SmallT5,
    detect_as,
    encode,
    load_dense,
    load_packed,
    random_weights,
    sizes,
    tiny_sentencepiece,
    with_tokenizer,
)
from snug.quant_backends.core.errors import SnugError
from vocabularies import sentencepiece_model

# Kind: ComfyUI's type of CLIP, its class and configuration; llama.cpp's name of it; what it is quantized to.
MODELS = {
    "LLAMA3_8": ("hidream", "Llama2", "Llama2Config", "llama", "GGUF Q4_K_M"),
    "QWEN3_4B": ("lumina2", "Qwen3_4B", "Qwen3_4BConfig", "qwen3", "GGUF Q6_K"),
    "QWEN25_3B": ("omnigen2", "Qwen25_3B", "Qwen25_3BConfig", "qwen2", "GGUF Q8_0"),
    "QWEN25_7B": ("qwen_image", "Qwen25_7BVLI", "Qwen25_7BVLI_Config", "qwen2vl", "GGUF Q5_K_S"),
    "GEMMA_2_2B": ("lumina2", "Gemma2_2B", "Gemma2_2B_Config", "gemma2", "GGUF Q4_0"),
}


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def quantize(clip: Any, target: str) -> Any:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip

    return quantize_clip(clip, QuantizeSettings(target))[0]


def save(clip: Any, container: str = "auto") -> list[Path]:
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders

    return save_text_encoders(clip, SaveSettings("encoder", container))


def same(one: Any, other: Any, model: Any) -> None:
    """Every weight in the same format with the same bytes, in the same order; and what comes out of them."""
    first, second = (
        {name: layer.weight for name, layer in model.packed_modules(clip.patcher.model)}
        for clip in (one, other)
    )
    assert first and first.keys() <= second.keys()
    for name, weight in first.items():
        assert second[name].params.format == weight.params.format, name
        assert torch.equal(second[name]._qdata.view(torch.uint8), weight._qdata.view(torch.uint8)), name
    given, found = (clip.patcher.model.state_dict() for clip in (one, other))
    plain = {name for name in given if name.removesuffix(".weight") not in second}
    assert given.keys() == found.keys() and all(torch.equal(found[name], given[name]) for name in plain)
    assert other.tokenize(PROMPT) == one.tokenize(PROMPT)
    wanted = encode(one)
    assert wanted.isfinite().all() and wanted.std() > 0.01
    assert torch.equal(encode(other), wanted)


def architecture(path: Path) -> str:
    return gguf.GGUFReader(path).fields["general.architecture"].contents()


@pytest.fixture
def make(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """make(kind) is a dense CLIP of this kind."""

    def build(kind: str) -> Any:
        from comfy.text_encoders import llama, qwen_vl

        tower, small = (
            qwen_vl.Qwen2VLVisionTransformer,
            {"num_layers": 2, "intermediate_size": 96, "num_heads": 4},
        )

        def build_tower(hidden_size: int, **options: Any) -> Any:
            return tower(hidden_size=128, **small, **options)

        monkeypatch.setattr(qwen_vl, "Qwen2VLVisionTransformer", build_tower)
        if kind not in comfy.sd.TEModel.__members__:
            pytest.skip(f"this ComfyUI does not know {kind}")
        folder = Path(comfy.sd.__file__).parent / "text_encoders" / "llama_tokenizer"
        if kind == "LLAMA3_8" and not (folder / "tokenizer.json").exists():
            pytest.skip("this ComfyUI has no llama_tokenizer")
        clip_type, model, config, *_ = MODELS[kind]
        is_gemma = kind.startswith("GEMMA")
        shape = sizes(256)
        if is_gemma or kind == "LLAMA3_8":
            shape["vocab_size"] = 512 if is_gemma else 128256
        monkeypatch.setattr(llama, config, functools.partial(getattr(llama, config), **shape))
        detect_as(comfy, monkeypatch, kind)
        module = getattr(llama, model)({}, torch.float32, "meta", comfy.ops.manual_cast)
        weights = random_weights(module, "Q8_0")
        if is_gemma:
            norms = [name for name in weights if name.endswith("norm.weight")]
            weights |= {name: (weights[name] * 16).round() / 64 for name in norms}
            weights = with_tokenizer(weights, tiny_sentencepiece("bpe"))
        save_file(weights, tmp_path / "dense.safetensors")
        return load_dense(comfy, tmp_path / "dense.safetensors", clip_type)

    return build


@pytest.mark.parametrize("target", ["GGUF Q8_0", "GGUF Q4_0", "GGUF Q4_K_M", "GGUF Q6_K"])
def test_t5(target: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any) -> None:
    monkeypatch.setattr(SmallT5, "sizes", {**SmallT5.sizes, "d_model": 256, "d_ff": 512, "d_kv": 64})
    save_file(SmallT5(monkeypatch).weights(comfy, umt5=False), tmp_path / "dense.safetensors")
    detect_as(comfy, monkeypatch, "T5_XXL")
    clip = quantize(load_dense(comfy, tmp_path / "dense.safetensors", "chroma"), target)
    (path,) = save(clip)
    assert path.suffix == ".gguf" and architecture(path) == "t5encoder"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["enc.blk.0.attn_rel_b.weight"] == kinds["enc.output_norm.weight"] == "F32"
    same(clip, load_packed(path, "chroma"), model)


@pytest.mark.parametrize("kind", MODELS)
def test_language_models(kind: str, make: Any, model: Any) -> None:
    """Qwen 2.5 VL with its vision part, Gemma with its tokenizer."""
    clip = quantize(make(kind), MODELS[kind][4])
    (path,) = save(clip)
    assert path.suffix == ".gguf" and architecture(path) == MODELS[kind][3]
    again = load_packed(path, MODELS[kind][0])
    same(clip, again, model)
    (second,) = save(again)  # what was loaded from such a file goes into another
    same(clip, load_packed(second, MODELS[kind][0]), model)


def test_rows_are_in_llama_cpps_order(make: Any, model: Any) -> None:
    clip = quantize(make("LLAMA3_8"), "GGUF Q8_0")
    (path,) = save(clip, "GGUF")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = dict(model.packed_modules(clip.patcher.model))
    for part, heads in (("q", 8), ("k", 4), ("v", 0)):
        layer = next(
            layer for name, layer in weights.items() if name.endswith(f"layers.0.self_attn.{part}_proj")
        )
        rows = layer.weight._qdata.view(torch.uint8).view(layer.weight.shape[0], -1).numpy()
        if heads:  # LlamaModel.permute of llama.cpp's converter
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        assert (stored[f"blk.0.attn_{part}.weight"].data == rows).all(), part


def test_umt5_brings_its_tokenizer(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any
) -> None:
    from snug.nodes.adapter import text_encoder_kinds

    small = SmallT5(monkeypatch)
    small.vocab_size = 6200
    weights = with_tokenizer(small.weights(comfy, umt5=True), sentencepiece_model("unigram"))
    detect_as(comfy, monkeypatch, "T5_XXL")
    monkeypatch.setitem(text_encoder_kinds.KINDS, "T5_XXL", ("UMT5-XXL", ("wan",)))
    save_file(weights, tmp_path / "dense.safetensors")
    clip = quantize(load_dense(comfy, tmp_path / "dense.safetensors", "wan"), "GGUF Q8_0")
    (path,) = save(clip)
    again = load_packed(path, "wan")
    same(clip, again, model)
    text = "ｆｕｌｌ ﬁ née  two spaces <extra_id_0> 水彩画 🦊"
    assert again.tokenize(text) == clip.tokenize(text)


def test_several_encoders(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any) -> None:
    """CLIP-L, which llama.cpp has no names for, keeps its own in a GGUF file beside that of T5."""
    save_file(SmallT5(monkeypatch).weights(comfy, umt5=False), tmp_path / "t5.safetensors")
    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), tmp_path / "l.safetensors")
    detect_as(comfy, monkeypatch, "T5_XXL")
    from snug.nodes.adapter.text_encoders import load_text_encoders

    dense = load_text_encoders([str(tmp_path / "l.safetensors"), str(tmp_path / "t5.safetensors")], "flux")
    clip = quantize(dense, "GGUF Q8_0")
    paths = save(clip)
    assert sorted(map(architecture, paths)) == ["clip", "t5encoder"]
    again = load_text_encoders(list(map(str, paths)), "flux")
    same(clip, again, model)
    pooled = [
        found.encode_from_tokens(found.tokenize(PROMPT), return_pooled=True)[1] for found in (clip, again)
    ]
    assert torch.equal(*pooled)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("tekken_model", r"\(qwen3\) has a tokenizer that .* into GGUF files; quantize .* safetensors"),
        ("spiece_model", "no SentencePiece model, or a damaged one"),
    ],
)
def test_tokenizers_that_do_not_fit(
    tokenizer: str, message: str, make: Any, monkeypatch: pytest.MonkeyPatch, output: Path
) -> None:
    clip = quantize(make("QWEN3_4B"), "GGUF Q8_0")
    found = {tokenizer: torch.full((9,), 10, dtype=torch.uint8)}
    monkeypatch.setattr(clip.tokenizer, "state_dict", lambda: found)
    with pytest.raises(SnugError, match=message):
        save(clip)
    assert list(output.iterdir()) == []
