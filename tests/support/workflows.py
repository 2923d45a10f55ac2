"""API-format workflows that sample a tiny model (scripts/tiny) with ComfyUI's own nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from comfy_server import ComfyServer
from safetensors.torch import load_file

Workflow = dict[str, dict[str, Any]]
Lora = tuple[str, float]


@dataclass(frozen=True, slots=True)
class SamplingSetup:
    """What a family wants: its empty latent and the shapes of its conditioning.

    embedding: tokens and width of the text embedding; pooled: width of the pooled output, 0 for none;
    attention_mask: whether the conditioning needs one;
    frames: length for video latents, 0 for image latents; vae: name of the TAESD pair that core's VAELoader
    finds (tiny.make_tiny_vae), None for families without one.
    """

    latent_node: str
    embedding: tuple[int, int]
    pooled: int = 0
    attention_mask: bool = False
    frames: int = 0
    cfg: float = 2.0
    vae: str | None = None


SETUPS: dict[str, SamplingSetup] = {
    "sd15": SamplingSetup("EmptyLatentImage", (77, 768), vae="taesd"),
    "sdxl": SamplingSetup("EmptyLatentImage", (77, 2048), pooled=1280, vae="taesdxl"),
    "sd3": SamplingSetup("EmptySD3LatentImage", (77, 4096), pooled=2048, vae="taesd3"),
    "flux": SamplingSetup("EmptySD3LatentImage", (32, 512), pooled=768, cfg=1.0, vae="taef1"),
    "qwen_image": SamplingSetup("EmptySD3LatentImage", (32, 3584)),
    # Z-Image pads prompts to a multiple of 32 tokens with a learned token: 20 makes it count.
    "lumina2": SamplingSetup("EmptySD3LatentImage", (20, 512), vae="taef1"),
    "wan": SamplingSetup("EmptyHunyuanLatentVideo", (32, 4096), frames=5),
    "ltxv": SamplingSetup("EmptyLTXVLatentVideo", (32, 4096), attention_mask=True, frames=9),
    "hunyuan_video": SamplingSetup("EmptyHunyuanLatentVideo", (32, 512), pooled=768, frames=5, cfg=1.0),
}


def build_workflow(
    family: str,
    loader: Literal["dense", "snug"],
    file: str,
    *,
    steps: int = 4,
    seed: int = 1,
    size: int = 64,
    cfg: float | None = None,
    loras: Sequence[Lora] = (),
    compute_dtype: str = "auto",
    output: str = "snug",
    decode: bool = False,
    model_info: bool = False,
) -> Workflow:
    """A workflow that samples `file` of models/diffusion_models and saves the latent.

    loader: "dense" is core's UNETLoader, "snug" the pack's. loras: (file name, strength), applied in order.
    size: pixels per side. output: prefix of the saved files. decode: also decode with the family's TAESD pair
    and save a PNG. model_info: also report the model as it is after sampling.

    Node ids are words: "latent" is the KSampler's input, "sampler" the KSampler; results are under
    outputs["save"]["latents"], outputs["image"]["images"] and outputs["info"]["model_info"].
    """
    setup = SETUPS[family]
    workflow: Workflow = {
        "model": _loader(loader, file, compute_dtype),
        "positive": _conditioning(setup, seed),
        "negative": _conditioning(setup, seed + 1),
        "latent": _latent(setup, size),
    }
    model = "model"
    for number, (name, strength) in enumerate(loras):
        inputs = {"model": [model, 0], "lora_name": name, "strength_model": strength}
        model = f"lora_{number}"
        workflow[model] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    workflow["sampler"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": [model, 0],
            "seed": seed,
            "steps": steps,
            "cfg": setup.cfg if cfg is None else cfg,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["latent", 0],
            "denoise": 1.0,
        },
    }
    workflow["save"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["sampler", 0], "filename_prefix": output},
    }
    if decode:
        workflow.update(_image(setup, output))
    if model_info:
        inputs = {"model": [model, 0], "samples": ["sampler", 0]}
        workflow["info"] = {"class_type": "SnugTestModelInfo", "inputs": inputs}
    return workflow


def _loader(loader: str, file: str, compute_dtype: str) -> dict[str, Any]:
    if loader == "dense":
        return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}
    inputs = {"model_name": file, "compute_dtype": compute_dtype}
    return {"class_type": "SnugLoadDiffusionModel", "inputs": inputs}


def _conditioning(setup: SamplingSetup, seed: int) -> dict[str, Any]:
    tokens, width = setup.embedding
    inputs = {
        "seed": seed,
        "tokens": tokens,
        "dim": width,
        "pooled_dim": setup.pooled,
        "attention_mask": setup.attention_mask,
    }
    return {"class_type": "SnugTestConditioning", "inputs": inputs}


def _latent(setup: SamplingSetup, size: int) -> dict[str, Any]:
    inputs = {"width": size, "height": size, "batch_size": 1}
    if setup.frames:
        inputs["length"] = setup.frames
    return {"class_type": setup.latent_node, "inputs": inputs}


def _image(setup: SamplingSetup, output: str) -> Workflow:
    if setup.vae is None:
        raise ValueError("this family has no TAESD pair to decode with; ask for the latent only")
    return {
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": setup.vae}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["vae", 0]}},
        "image": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": output}},
    }


def with_node(workflow: Workflow, after: str, name: str, class_type: str, **inputs: Any) -> Workflow:
    """The workflow with a node MODEL -> MODEL, report behind `after`; the report is in outputs["report"]["text"]."""
    for node in workflow.values():
        for key, value in node["inputs"].items():
            if key == "model" and value == [after, 0]:
                node["inputs"][key] = [name, 0]
    workflow[name] = {"class_type": class_type, "inputs": {"model": [after, 0], **inputs}}
    workflow["report"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 1]}}
    return workflow


def with_casting(workflow: Workflow, after: str, **settings: Any) -> Workflow:
    """With layerwise casting behind the node `after`."""
    inputs = {"storage_dtype": "float8_e4m3fn per row", "compute_dtype": "auto", "skip_patterns": "default"}
    return with_node(workflow, after, "casting", "SnugLayerwiseCasting", **{**inputs, **settings})


def with_offload(workflow: Workflow, after: str, **settings: Any) -> Workflow:
    """With group offloading behind the node `after`."""
    inputs = {"limit_gb": 0.0, "level": "blocks", "blocks_per_group": 1, "prefetch": "auto"}
    more = {"pin_memory": True, "offload_to": "CPU memory"}
    return with_node(workflow, after, "offload", "SnugGroupOffload", **{**inputs, **more, **settings})


def saved_latent(server: ComfyServer, outputs: dict[str, Any], node: str = "save") -> torch.Tensor:
    """The latent that a node of a workflow saved."""
    saved = outputs[node]["latents"][0]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
