"""Every tensor of ComfyUI's text-encoder classes, at full size, is found in a llama.cpp file under its new name.

The classes are built on the meta device; the gguf package gives the names that the converters would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from text_encoder_files import gguf_names, vision_names

CLASSES = [
    ("Llama2", "llama"),
    ("Mistral3Small24B", "llama"),
    ("Mistral3Small24B", "mistral3"),
    ("Ministral3_3B", "mistral3"),
    ("Qwen25_3B", "qwen2vl"),
    ("Qwen25_7BVLI", "qwen2vl"),
    ("Qwen3_06B", "qwen3"),
    ("Qwen3_4B", "qwen3"),
    ("Qwen3_8B", "qwen3"),
    ("Gemma2_2B", "gemma2"),
    ("Gemma3_4B", "gemma3"),
    ("Gemma3_12B", "gemma3"),
]


def build(comfy: Any, name: str) -> set[str]:
    from comfy.text_encoders import llama

    if not hasattr(llama, name):
        pytest.skip(f"this ComfyUI has no {name}")
    module = getattr(llama, name)({}, torch.float16, "meta", comfy.ops.manual_cast)
    return set(module.state_dict())


@pytest.mark.parametrize("name", ["Gemma4_E4B", "Gemma4_E2B", "Gemma4_12B", "Gemma4_31B"])
def test_gemma4(name: str, comfy: Any) -> None:
    gemma4 = pytest.importorskip("comfy.text_encoders.gemma4")
    module = getattr(gemma4, name)({}, torch.float16, "meta", comfy.ops.manual_cast)
    wanted = {key for key in module.state_dict() if key.startswith("model.")}
    # The converter adds what llama.cpp's names all end with.
    stored = {f"{key}.weight" if key.endswith("layer_scalar") else key for key in wanted}
    assert mapped(gguf_names(stored, "gemma4"), "gemma4") == wanted


def mapped(names: dict[str, str], architecture: str) -> set[str]:
    from snug.quant_backends.readers.text_encoder_gguf import mapped_name
    from snug.quant_backends.readers.text_encoder_tables import FAMILIES

    found = (mapped_name(new, FAMILIES[architecture].names) for new in names.values())
    return {name for name in found if name is not None}


@pytest.mark.parametrize("name,architecture", CLASSES)
def test_language_models(name: str, architecture: str, comfy: Any) -> None:
    wanted = {key for key in build(comfy, name) if key.startswith("model.")}  # the rest sees images
    # llama.cpp knows the output layer under the name that it has outside of ComfyUI.
    stored = {key.replace("model.lm_head.", "lm_head.") for key in wanted}
    assert mapped(gguf_names(stored, architecture), architecture) == stored


@pytest.mark.parametrize(
    "config", ["t5_config_xxl", "umt5_config_xxl", "t5_old_config_xxl", "t5_config_base"]
)
def test_t5(config: str, comfy: Any) -> None:
    from comfy.text_encoders import t5
    from snug.quant_backends.readers.text_encoder_gguf import mapped_name
    from snug.quant_backends.readers.text_encoder_tables import T5_NAMES, T5_UNGATED

    folder = Path(comfy.sd.__file__).parent / "text_encoders"
    settings = json.loads((folder / f"{config}.json").read_text())
    wanted = set(t5.T5(settings, torch.float16, "meta", comfy.ops.manual_cast).state_dict())
    names = gguf_names(wanted, "t5encoder")
    overrides = {} if any("wi_0" in name for name in wanted) else T5_UNGATED
    assert {mapped_name(new, T5_NAMES, overrides) for new in names.values()} == wanted


def test_vision_of_qwen25(comfy: Any) -> None:
    tower = {key.removeprefix("visual.") for key in build(comfy, "Qwen25_7BVLI") if key.startswith("visual.")}
    assert vision_model_names(tower, "qwen2.5vl_merger") == {f"visual.{key}" for key in tower}


def test_vision_of_qwen3(comfy: Any) -> None:
    qwen3vl = pytest.importorskip("comfy.text_encoders.qwen3vl")
    config = {
        **qwen3vl.QWEN3VL_VISION_COMMON,
        **qwen3vl.QWEN3VL_VISION["qwen3vl_4b"],
        "out_hidden_size": 2560,
    }
    module = qwen3vl.Qwen3VLVisionModel(config, device="meta", dtype=torch.float16, ops=comfy.ops.manual_cast)
    tower = set(module.state_dict())
    assert vision_model_names(tower, "qwen3vl_merger") == {f"model.visual.{key}" for key in tower}


def vision_model_names(tower: set[str], projector: str) -> set[str]:
    from snug.quant_backends.readers.text_encoder_tables import SECOND_PATCH, VISION_FAMILIES
    from snug.quant_backends.readers.vision_gguf import new_name

    stored = {name for names in vision_names(tower, projector).values() for name in names} - {SECOND_PATCH}
    found = {new_name(name, VISION_FAMILIES[projector], [5, 11, 17]) for name in stored}
    return {re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", name) for name in found}


def test_the_gguf_package_agrees_on_the_architectures() -> None:
    from snug.quant_backends.readers.text_encoder_tables import FAMILIES

    assert set(FAMILIES) <= set(gguf.MODEL_ARCH_NAMES.values())
