"""Kinds of text encoders that are no GGUF files: quantized safetensors of them, on-load quantizing, saving.

The reference is ComfyUI's own loader with the same weights in plain files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from other_text_encoders import OTHERS, Weights, make, make_music
from quantized_files import dense_tensors, quantize_tensors
from safetensors.torch import save_file
from small_text_encoders import PROMPT
from snug.quant_backends.core.errors import SnugError

TOKENIZERS = ("spiece_model", "tokenizer_json")


def write(folder: Path, weights: Sequence[Weights], kind: str) -> tuple[list[Path], list[Path]]:
    """(files of the kind, plain twins in float32 with the tokenizers as they are)."""
    files, twins = [], []
    for number, part in enumerate(weights):
        tensors, metadata = quantize_tensors(part, kind)
        path, twin = folder / f"{kind}-{number}.safetensors", folder / f"twin-{kind}-{number}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
        save_file({**dense_tensors(path), **{name: part[name] for name in TOKENIZERS if name in part}}, twin)
        files.append(path)
        twins.append(twin)
    return files, twins


def load(paths: Sequence[Path], name: str, **options: Any) -> Any:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    return load_text_encoders(list(map(str, paths)), OTHERS[name][1], **options)


def reference(comfy: Any, paths: Sequence[Path], name: str) -> Any:
    kind = getattr(comfy.sd.CLIPType, OTHERS[name][1].upper())
    options = {"dtype": torch.float32}
    return comfy.sd.load_clip(list(map(str, paths)), clip_type=kind, model_options=options)


def outputs(clip: Any) -> tuple[torch.Tensor, ...]:
    """Everything that comes out: some are pooled."""
    found = clip.encode_from_tokens(clip.tokenize(PROMPT), return_dict=True)
    tensors = tuple(found[key] for key in ("cond", "pooled_output") if found.get(key) is not None)
    assert all(tensor.isfinite().all() and tensor.std() > 0.01 for tensor in tensors)
    return tensors


def packed_modules(clip: Any) -> list[tuple[str, Any]]:
    from snug.nodes.adapter import packed_module

    return list(packed_module.packed_modules(clip.cond_stage_model))


def formats(clip: Any) -> set[str]:
    return {layer.weight.params.format for _, layer in packed_modules(clip)}


@pytest.mark.parametrize("name", OTHERS)
def test_quantized_safetensors(
    name: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = make(name, comfy, monkeypatch)
    for kind in ("nf4", "fp8") if name != "Qwen3.5" else ("fp8",):
        files, twins = write(tmp_path, weights, kind)
        wanted = outputs(reference(comfy, twins, name))
        for found, target in zip(outputs(load(files, name)), wanted, strict=True):
            torch.testing.assert_close(found, target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_16_bits_are_exact(name: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through Snug's layers, as beside a file of another kind."""
    from snug.nodes.adapter import text_encoders

    monkeypatch.setattr(text_encoders, "_is_for_core", lambda encoder: False)
    files, twins = [], []
    for number, part in enumerate(make(name, comfy, monkeypatch)):
        half = {key: value.bfloat16() if value.dim() > 1 else value for key, value in part.items()}
        files.append(tmp_path / f"half-{number}.safetensors")
        twins.append(tmp_path / f"twin-{number}.safetensors")
        save_file(half, files[-1])
        plain = {
            key: value.float() if value.dtype is torch.bfloat16 else value for key, value in half.items()
        }
        save_file(plain, twins[-1])
    wanted = outputs(reference(comfy, twins, name))
    assert all(map(torch.equal, outputs(load(files, name)), wanted))


@pytest.mark.parametrize("name", OTHERS)
def test_quantize_save_and_load(
    name: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In memory and while loading."""
    import folder_paths
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    paths = []
    for number, part in enumerate(make(name, comfy, monkeypatch)):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(part, paths[-1])
    dense = reference(comfy, paths, name)
    clip = quantize_clip(dense, QuantizeSettings("bitsandbytes NF4"))[0]
    wanted = outputs(clip)
    again = load(save_text_encoders(clip, SaveSettings("encoder")), name)
    assert formats(again) >= formats(clip) and all(map(torch.equal, outputs(again), wanted))
    assert again.tokenize(PROMPT) == dense.tokenize(PROMPT)
    on_load = load(paths, name, quantize="bitsandbytes NF4")
    assert all(map(torch.equal, outputs(on_load), wanted))


@pytest.mark.parametrize(
    ("target", "are_packed"), [("GGUF Q8_0", True), ("bitsandbytes NF4", True), ("FP8 e4m3fn per row", False)]
)
def test_experts(
    target: str, are_packed: bool, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One weight holds all of a mixture's: a format must say nothing of its rows."""
    from snug.nodes.adapter.layout import is_packed
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip

    (weights,) = make("GPT-OSS", comfy, monkeypatch)
    save_file(weights, tmp_path / "gpt-oss.safetensors")
    dense = reference(comfy, [tmp_path / "gpt-oss.safetensors"], "GPT-OSS")
    clip = quantize_clip(dense, QuantizeSettings(target))[0]
    block = clip.cond_stage_model.gpt_oss.transformer.layers[0]
    assert is_packed(block.self_attn.q_proj.weight)
    experts = block.mlp.experts
    assert [is_packed(bank.weight) for bank in (experts.gate_up_proj, experts.down_proj)] == 2 * [are_packed]
    (found,) = outputs(clip)
    if target == "GGUF Q8_0":  # on whose grid the weights lie
        torch.testing.assert_close(found, outputs(dense)[0], rtol=1e-3, atol=1e-3)
    if are_packed:  # the same as with every expert decoded at once
        for bank in [layer for _, layer in packed_modules(clip) if hasattr(layer, "num_experts")]:
            bank.weight = torch.nn.Parameter(bank.dense_weight(), requires_grad=False)
        torch.testing.assert_close(outputs(clip)[0], found, rtol=1e-5, atol=1e-5)


def test_gguf_of_such_a_kind_is_refused(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders

    (weights,) = make("T5Gemma", comfy, monkeypatch)
    save_file(weights, tmp_path / "t5gemma.safetensors")
    clip = quantize_clip(load([tmp_path / "t5gemma.safetensors"], "T5Gemma"), QuantizeSettings("GGUF Q8_0"))[
        0
    ]
    with pytest.raises(SnugError, match="of a kind that cannot be loaded from a GGUF file"):
        save_text_encoders(clip, SaveSettings("encoder"))


def test_jina_clip_alone_is_refused(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ComfyUI gives it no tokenizer then."""
    _, weights = make("Gemma 3 and Jina CLIP", comfy, monkeypatch)
    save_file(weights, tmp_path / "jina.safetensors")
    message = "this is Jina CLIP v2, which is used beside Gemma 3 4B; choose both, and type newbie"
    with pytest.raises(SnugError, match=message):
        load([tmp_path / "jina.safetensors"], "Gemma 3 and Jina CLIP")


def test_music(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MiniMax Music 3's language model: plain by ComfyUI; quantized while it is loaded, and saved."""
    import folder_paths
    from snug.nodes.adapter import text_encoders
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    path = tmp_path / "music.safetensors"
    save_file(make_music(comfy, monkeypatch), path)

    def frames(clip: Any) -> torch.Tensor:
        found = clip.encode_from_tokens(clip.tokenize(PROMPT, max_audio_frames=3, seed=1))
        assert found.isfinite().all() and found.std() > 0.01
        return found

    load = text_encoders.load_text_encoders
    with pytest.raises(SnugError, match="this is MiniMax Music 3, which type flux2 does not use"):
        load([str(path)], "flux2")
    wanted = frames(load([str(path)], "minimax"))
    with monkeypatch.context() as patch:
        patch.setattr(text_encoders, "_is_for_core", lambda encoder: False)
        assert torch.equal(frames(load([str(path)], "minimax")), wanted)
    quantized = load([str(path)], "minimax", quantize="bitsandbytes NF4")
    assert "bnb-nf4-64" in formats(quantized)
    (saved,) = save_text_encoders(quantized, SaveSettings("music"))
    assert torch.equal(frames(load([str(saved)], "minimax")), frames(quantized))
