"""What surrounds the weights of text encoders: mixing files, LoRA, memory, progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import (
    SmallCLIP,
    SmallT5,
    detect_as,
    encode,
    load_dense,
    load_packed,
)
from text_encoder_files import add, finish, write_text_encoder

PROMPT = "a fox under the moon"
Files = tuple[Path, Path]


@pytest.fixture
def t5(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Files:
    """(GGUF, dense twin) of a small T5-XXL."""
    weights = SmallT5(monkeypatch).weights(comfy, umt5=False)
    detect_as(comfy, monkeypatch, "T5_XXL")
    dense = tmp_path / "t5.safetensors"
    save_file(weights, dense)
    return write_text_encoder(tmp_path / "t5.gguf", weights, "t5encoder"), dense


def write(path: Path, tensors: dict[str, torch.Tensor], architecture: str, format: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        add(writer, name, tensor, format)
    return finish(writer, path)


def packed(clip: Any) -> dict[str, Any]:
    from snug.nodes.adapter.packed_module import packed_modules

    return dict(packed_modules(clip.cond_stage_model))


def test_weights_stay_packed_views_of_the_file(t5: Files) -> None:
    clip = load_packed(t5[0], "chroma")
    modules = packed(clip)
    assert (
        len(modules) == 1 + 2 * 7
    )  # the embedding; per block query, key, value, output and three of the MLP
    places = [module.weight._qdata.data_ptr() for module in modules.values()]
    assert max(places) - min(places) < t5[0].stat().st_size, "all lie in one mapping"
    assert {module.weight.dtype for module in modules.values()} == {torch.float32}
    encode(clip, PROMPT)
    assert packed(clip).keys() == modules.keys()


def test_sizes_are_those_of_the_packed_weights(t5: Files, comfy: Any) -> None:
    """ComfyUI 0.3.75 counts an encoder on the CPU before it has weights."""
    patcher = load_packed(t5[0], "chroma").patcher
    size = comfy.model_management.module_size(patcher.model)
    assert 0.9 * t5[0].stat().st_size < size < 1.1 * t5[0].stat().st_size
    assert patcher.model_size() == size
    assert patcher.loaded_size() in (0, size)


def test_lora(t5: Files, comfy: Any) -> None:
    """The conditioning changes as it does on the dense twin, and the LoRA leaves no trace."""
    generator = torch.Generator().manual_seed(5)
    changes = []
    for load, path in ((load_packed, t5[0]), (lambda p, t: load_dense(comfy, p, t), t5[1])):
        clip = load(path, "chroma")
        before = encode(clip, PROMPT)
        lora = {}
        generator.manual_seed(5)
        for name, value in clip.cond_stage_model.state_dict().items():
            if name.endswith("SelfAttention.q.weight") or name.endswith("wo.weight"):
                stem = f"text_encoders.{name.removesuffix('.weight')}"
                rows, columns = value.shape
                lora[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
                lora[f"{stem}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.3
        _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.8)
        assert len(patched.patcher.patches) == 4
        changes.append(encode(patched, PROMPT) - before)
        torch.testing.assert_close(encode(clip, PROMPT), before, rtol=1e-5, atol=1e-5)
    assert changes[1].norm() > 0.05 * before.norm()
    assert (changes[0] - changes[1]).norm() < 0.001 * changes[1].norm()


def test_factory_builds_the_same_encoder_again(t5: Files) -> None:
    clip = load_packed(t5[0], "chroma")
    factory, arguments = clip.patcher.cached_patcher_init
    again = clip.clone()
    again.patcher = factory(*arguments, disable_dynamic=True)
    again.cond_stage_model = again.patcher.model
    assert again.cond_stage_model is not clip.cond_stage_model
    assert torch.equal(encode(again, PROMPT), encode(clip, PROMPT))


def test_safetensors_alone_go_to_core(t5: Files) -> None:
    clip = load_packed(t5[1], "chroma")
    assert packed(clip) == {}
    assert encode(clip, PROMPT).isfinite().all()


def test_progress_reaches_the_end(t5: Files, comfy: Any) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        load_packed(t5[0], "chroma")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen[-1][0] == seen[-1][1]
    assert [value for value, _ in seen] == sorted(value for value, _ in seen)


@pytest.mark.parametrize("mixed", ["CLIP-L as GGUF", "T5 as GGUF", "both as GGUF"])
def test_flux_pair_of_any_mix(
    mixed: str, t5: Files, comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP-L and T5, each as GGUF or float16 safetensors."""
    from snug.nodes.adapter.text_encoders import load_text_encoders

    weights = {
        name: tensor.half().float()
        for name, tensor in SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json").items()
        if name != "text_projection.weight"
    }
    dense = tmp_path / "clip_l.safetensors"
    save_file({name: tensor.half() for name, tensor in weights.items()}, dense)
    packed_file = write(tmp_path / "clip_l.gguf", weights, "clip_l", "F16")
    clips = packed_file if mixed != "T5 as GGUF" else dense
    t5_file = t5[0] if mixed != "CLIP-L as GGUF" else t5[1]
    reference = comfy.sd.load_clip(
        [str(t5[1]), str(dense)], clip_type=comfy.sd.CLIPType.FLUX, model_options={"dtype": torch.float32}
    )
    clip = load_text_encoders([str(t5_file), str(clips)], "flux")
    tokens = clip.tokenize(PROMPT)
    found, wanted = (c.encode_from_tokens(tokens, return_pooled=True) for c in (clip, reference))
    assert wanted[1].std() > 0.01
    for value, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-3, atol=1e-3)


def test_every_type_of_the_tables_is_one_of_comfyuis(comfy: Any) -> None:
    from snug.nodes.adapter.text_encoder_kinds import KINDS, TOGETHER, clip_types

    types = clip_types()
    assert types[0] == "stable_diffusion" and "flux" in types and len(types) == len(set(types))
    named = {entry for _, entries in KINDS.values() for entry in entries} | {
        t for n in TOGETHER.values() for t in n
    }
    newer = {
        "cogvideox",
        "longcat_image",
        "pixeldit",
        "ideogram4",
        "ovis",
        "newbie",
        "kandinsky5",
        "kandinsky5_image",
        "minimax",
    }
    assert named - set(types) <= newer
    for kind in ("CLIP_L", "T5_XXL", "QWEN25_7B", "GEMMA_2_2B", "LLAMA3_8"):
        assert kind in comfy.sd.TEModel.__members__
