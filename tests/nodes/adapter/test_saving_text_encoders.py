"""Text encoders saved as GGUF load again with the same weights, tokens and conditioning, whatever their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from encoder_families import FAMILIES, Builder
from safetensors.torch import save_file
from small_text_encoders import PROMPT, SmallCLIP, SmallT5, detect_as, encode, load_packed
from snug.quant_backends.core.errors import SnugError

# What each is quantized to where its own tokenizer is looked at; the rest of the types in the test of all targets.
TARGETS = {
    "T5_XXL": "GGUF Q4_0",
    "UMT5_XXL": "GGUF Q8_0",
    "LLAMA3_8": "GGUF Q4_K_M",
    "QWEN3_4B": "GGUF Q6_K",
    "QWEN25_3B": "GGUF Q8_0",
    "QWEN25_7B": "GGUF Q5_K_S",
    "QWEN3VL_4B": "GGUF Q8_0",
    "GEMMA_2_2B": "GGUF Q4_0",
    "GEMMA_3_4B": "GGUF Q5_K_M",
    "GEMMA_4_E4B": "GGUF Q8_0",
    "MISTRAL3_24B": "GGUF Q8_0",
    "MINISTRAL_3_3B": "GGUF Q3_K_M",
}


TEXTS = ["ｆｕｌｌ ﬁ née  two spaces <extra_id_0> 水彩画 🦊", "[INST] it's 2024\n\n  don't <end_of_turn>", ""]


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
def make(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """make(kind) is a dense CLIP of this kind."""
    return Builder(comfy, monkeypatch, tmp_path).make


@pytest.mark.parametrize("kind", TARGETS)
def test_families(kind: str, make: Any, model: Any) -> None:
    """With the tokenizers of those that ComfyUI brings none for, and with vision parts."""
    clip = quantize(make(kind), TARGETS[kind])
    (path,) = save(clip)
    assert path.suffix == ".gguf" and architecture(path) == FAMILIES[kind].architecture
    again = load_packed(path, FAMILIES[kind].clip_type)
    same(clip, again, model)
    for text in TEXTS:
        assert again.tokenize(text) == clip.tokenize(text), text
    if kind == "QWEN3VL_4B":  # by which ComfyUI's detection, which this test replaces, knows it
        names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
        assert "model.visual.deepstack_merger_list.0.norm.weight" in names
    if kind in ("T5_XXL", "LLAMA3_8", "MINISTRAL_3_3B"):
        (second,) = save(again)  # what was loaded from such a file goes into another
        same(clip, load_packed(second, FAMILIES[kind].clip_type), model)


def test_sizes_are_told(make: Any) -> None:
    """What llama.cpp and others need beside the tensors."""
    (path,) = save(quantize(make("GEMMA_3_4B"), "GGUF Q8_0"))
    fields = gguf.GGUFReader(path).fields
    wanted = {
        "block_count": 4,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "context_length": 131072,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.sliding_window": 1024,
        "rope.freq_base": 1e6,
    }
    assert {key: fields[f"gemma3.{key}"].contents() for key in wanted} == wanted
    epsilon = fields["gemma3.attention.layer_norm_rms_epsilon"]
    assert epsilon.types == [gguf.GGUFValueType.FLOAT32] and epsilon.contents() == pytest.approx(1e-6)


def test_t5s_position_bias_stays_exact(make: Any) -> None:
    (path,) = save(quantize(make("T5_XXL"), "GGUF Q4_K_M"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["enc.blk.0.attn_rel_b.weight"] == kinds["enc.output_norm.weight"] == "F32"


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
        ("tekken_model", r"\(qwen3\) has a tekken_model as its tokenizer.* quantize .* safetensors"),
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
