"""The checkpoint, LoRA and ControlNet nodes in the real server, beside core's own loaders of the dense files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import clip_weights, diffusion_weights, prefixed, taesd
from comfy_server import ComfyServer, WorkflowError
from controlnet_files import classic_controlnet
from lora_files import generic_names, random_factors, write_adapter
from PIL import Image
from quantized_files import dense_tensors, quantize_tensors
from safetensors import safe_open
from safetensors.torch import save_file
from text_encoder_files import snap
from tiny import use_comfyui
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture
def folder(comfy_server: ComfyServer) -> Iterator[Callable[[str], Path]]:
    """folder(name) below models; what a test puts there is removed after it."""
    used: list[Path] = []

    def find(name: str) -> Path:
        path = comfy_server.base / "models" / name
        path.mkdir(parents=True, exist_ok=True)
        used.append(path)
        return path

    yield find
    comfy_server.free()
    for path in used:
        for file in path.iterdir():
            file.unlink()


def error(latents: list[torch.Tensor]) -> float:
    return ((latents[0] - latents[1]).norm() / latents[1].norm()).item()


def image_workflow(loader: dict[str, Any], output: str) -> Workflow:
    """Prompts, sampling and decoding with the three outputs of one loader."""
    workflow = build_workflow("sd15", "snug", "", output=output, steps=3)
    workflow["model"] = loader
    for name, text in (("positive", "a red fox under the moon"), ("negative", "blurry")):
        workflow[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": text}}
    workflow["decode"] = {
        "class_type": "VAEDecode",
        "inputs": {"samples": ["sampler", 0], "vae": ["model", 2]},
    }
    inputs = {"images": ["decode", 0], "filename_prefix": output}
    workflow["image"] = {"class_type": "SaveImage", "inputs": inputs}
    return workflow


def test_checkpoint(
    comfy_server: ComfyServer, comfyui_path: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """NF4 all-in-one to image, as from the dense checkpoint of the same weights through core's node."""
    use_comfyui(comfyui_path)
    clip = {n: value for n, value in clip_weights(comfyui_path, "clip_l").items() if "projection" not in n}
    tensors = {
        **prefixed("model.diffusion_model.", diffusion_weights(tmp_path, "sd15")),
        **prefixed("cond_stage_model.transformer.", clip),
        **prefixed("first_stage_model.", taesd(tmp_path, "taesd")),
    }
    packed, metadata = quantize_tensors({name: value.half() for name, value in tensors.items()}, "nf4")
    checkpoints = folder("checkpoints")
    save_file(packed, checkpoints / "nf4.safetensors", metadata=metadata)
    dense = dense_tensors(checkpoints / "nf4.safetensors")
    save_file(dense, checkpoints / "dense.safetensors")
    loaders = {
        "snug": ("SnugLoadCheckpoint", {"checkpoint_name": "nf4.safetensors", "compute_dtype": "auto"}),
        "dense": ("CheckpointLoaderSimple", {"ckpt_name": "dense.safetensors"}),
    }
    latents, images = [], []
    for name, (node, inputs) in loaders.items():
        outputs = comfy_server.run(image_workflow({"class_type": node, "inputs": inputs}, name))
        latents.append(saved_latent(comfy_server, outputs))
        saved = outputs["image"]["images"][0]
        path = comfy_server.base / "output" / saved["subfolder"] / saved["filename"]
        images.append(torch.from_numpy(np.array(Image.open(path))).float())
    assert error(latents) < 0.02  # the dense file's text encoder is calculated from float16
    assert images[1].std() > 5
    assert (images[0] - images[1]).abs().mean() < 3


def test_lora(
    comfy_server: ComfyServer,
    folder: Callable[[str], Path],
    twins: Callable[[str, str], Twins],
) -> None:
    """A GGUF LoRA on a GGUF model, as the same LoRA through core's node on the dense model."""
    pair = twins("sd3", "Q8_0")
    with safe_open(str(pair.dense), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if "blocks." in name}  # noqa: SIM118
    layers = {
        n.removesuffix(".weight"): tuple(s)
        for n, s in shapes.items()
        if n.endswith(".weight") and len(s) == 2
    }
    factors = {
        layer: (snap(down, "Q8_0"), snap(up, "Q8_0")) for layer, (down, up) in random_factors(layers).items()
    }
    loras = folder("loras")
    write_adapter(loras / "tiny.gguf", factors, "sd3", "Q8_0", alpha=8.0)
    save_file(generic_names(factors, "diffusion_model.", 8.0), loras / "tiny.safetensors")
    latents = []
    for loader, file, node, name in (
        ("snug", pair.gguf.name, "SnugLoadLora", "tiny.gguf"),
        ("dense", pair.dense.name, "LoraLoaderModelOnly", "tiny.safetensors"),
        ("dense", pair.dense.name, None, None),
    ):
        workflow = build_workflow("sd3", loader, file, output=loader, steps=2)  # type: ignore[arg-type]
        if node is not None:
            inputs = {"model": ["model", 0], "lora_name": name, "strength_model": 0.9}
            inputs |= {"strength_clip": 1.0} if node == "SnugLoadLora" else {}
            workflow["lora"] = {"class_type": node, "inputs": inputs}
            workflow["sampler"]["inputs"]["model"] = ["lora", 0]
        latents.append(saved_latent(comfy_server, comfy_server.run(workflow)))
    assert (latents[1] - latents[2]).norm() > 0.05 * latents[2].norm()
    assert error(latents) < 0.01


def test_lora_for_another_model(
    comfy_server: ComfyServer, folder: Callable[[str], Path], twins: Callable[[str, str], Twins]
) -> None:
    """The message that the error panel shows."""
    other = {"transformer.single_transformer_blocks.0.attn.to_k": (64, 64)}
    save_file(generic_names(random_factors(other), ""), folder("loras") / "flux.safetensors")
    workflow = build_workflow("sd3", "snug", twins("sd3", "Q8_0").gguf.name)
    inputs = {
        "model": ["model", 0],
        "lora_name": "flux.safetensors",
        "strength_model": 1.0,
        "strength_clip": 1.0,
    }
    workflow["lora"] = {"class_type": "SnugLoadLora", "inputs": inputs}
    workflow["sampler"]["inputs"]["model"] = ["lora", 0]
    with pytest.raises(WorkflowError, match=r"flux\.safetensors: this LoRA fits none.*made for Flux"):
        comfy_server.run(workflow)


def test_controlnet(
    comfy_server: ComfyServer,
    comfyui_path: Path,
    folder: Callable[[str], Path],
    twins: Callable[[str, str], Twins],
) -> None:
    """A scaled FP8 ControlNet on a GGUF model, as the dense one through core's node on the dense model."""
    use_comfyui(comfyui_path)
    tensors = {name: value.half() for name, value in classic_controlnet().items()}
    controlnets, pair = folder("controlnet"), twins("sd15", "Q8_0")
    packed, metadata = quantize_tensors(tensors, "fp8")
    save_file(packed, controlnets / "fp8.safetensors", metadata=metadata)
    save_file(dense_tensors(controlnets / "fp8.safetensors"), controlnets / "dense.safetensors")
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / "hint.png")
    latents = []
    for loader, file, node, name in (
        ("snug", pair.gguf.name, "SnugLoadControlNet", "fp8.safetensors"),
        ("dense", pair.dense.name, "ControlNetLoader", "dense.safetensors"),
        ("dense", pair.dense.name, None, None),
    ):
        workflow = build_workflow("sd15", loader, file, output=loader, steps=2)  # type: ignore[arg-type]
        if node is not None:
            workflow["control"] = {"class_type": node, "inputs": {"control_net_name": name}}
            workflow["hint"] = {"class_type": "LoadImage", "inputs": {"image": "hint.png"}}
            inputs = {"conditioning": ["positive", 0], "control_net": ["control", 0], "image": ["hint", 0]}
            workflow["steered"] = {"class_type": "ControlNetApply", "inputs": {**inputs, "strength": 0.9}}
            workflow["sampler"]["inputs"]["positive"] = ["steered", 0]
        latents.append(saved_latent(comfy_server, comfy_server.run(workflow)))
    assert (latents[1] - latents[2]).norm() > 0.05 * latents[2].norm()
    assert error(latents) < 0.01
