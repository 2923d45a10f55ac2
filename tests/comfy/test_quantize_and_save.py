"""Quantize, save, load again between the stock nodes of one running server: the same latents on every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent, with_node

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("family", "target", "ending"),
    [("wan", "GGUF Q4_0", "gguf")],
)
def test_quantize_save_load(
    family: str,
    target: str,
    ending: str,
    twins: Callable[[str, str], Twins],
    comfy_server: ComfyServer,
) -> None:
    files = twins(family, "F32")
    saved = files.dense.parent / f"saved.{ending}"

    def latent(workflow: Workflow) -> torch.Tensor:
        return saved_latent(comfy_server, comfy_server.run(workflow))

    plain = latent(build_workflow(family, "dense", files.dense.name, steps=2))
    workflow = build_workflow(family, "dense", files.dense.name, steps=2)
    with_node(workflow, "model", "quantize", "SnugQuantizeModel", target=target, skip_patterns="default")
    workflow["keep"] = {
        "class_type": "SnugSaveModel",
        "inputs": {
            "model": ["quantize", 0],
            "filename_prefix": "diffusion_models/saved",
            "format": "auto",
            "if_exists": "replace",
            "folder": "models folder",
        },
    }
    try:
        outputs = comfy_server.run(workflow)
        quantized = saved_latent(comfy_server, outputs)
        assert f"layers quantized to {target}" in outputs["report"]["text"][0]
        assert Path(outputs["keep"]["text"][0]) == saved
        assert not torch.equal(quantized, plain)
        assert torch.equal(latent(build_workflow(family, "snug", saved.name, steps=2)), quantized)
        on_load = build_workflow(family, "snug", files.dense.name, steps=2)
        on_load["model"]["inputs"]["quantize"] = target
        assert torch.allclose(latent(on_load), quantized, rtol=1e-5, atol=1e-5)
        workflow["keep"]["inputs"] |= {"filename_prefix": "../saved"}
        with pytest.raises(WorkflowError, match="is no name inside") as caught:
            comfy_server.run(workflow)
        assert caught.value.node_type == "SnugSaveModel"
    finally:
        comfy_server.free()
        saved.unlink(missing_ok=True)


TARGETS = (
    "GGUF Q4_K_M",
    "bitsandbytes NF4 double",
    "bitsandbytes LLM.int8",
    "torchao int8",
    "quanto int4",
    "FP8 e4m3fn per row",
    "FP8 e4m3fn per tensor",
    "FP8 dynamic",
    "FP8 static",
    "INT8 per row rotated",
    "INT8 dynamic",
    "INT8 static",
)


def test_every_backend(twins: Callable[[str, str], Twins], comfy_server: ComfyServer) -> None:
    """Two prompts: one quantizes to each target, samples and saves; the other loads what was saved and samples."""
    dense = twins("sd3", "F32").dense
    first, second = (build_workflow("sd3", "dense", dense.name, steps=2) for _ in range(2))
    sampler = first.pop("sampler")["inputs"]
    for workflow, names in ((first, ["save"]), (second, ["save", "sampler", "model"])):
        for name in names:
            workflow.pop(name)
    shared = ("positive", "negative", "cfg", "sampler_name", "scheduler", "steps")
    calibrate = {key: sampler[key] for key in shared}
    calibrate |= {"model": ["model", 0], "latent_image": ["latent", 0], "seed": 7}
    first["calibrate"] = {"class_type": "SnugCalibrate", "inputs": calibrate}

    def sample(workflow: Workflow, target: str, model: str) -> None:
        workflow[f"sample {target}"] = {"class_type": "KSampler", "inputs": {**sampler, "model": [model, 0]}}
        inputs = {"samples": [f"sample {target}", 0], "filename_prefix": "every"}
        workflow[f"latent {target}"] = {"class_type": "SaveLatent", "inputs": inputs}

    for number, target in enumerate(TARGETS):
        inputs = {"model": ["model", 0], "target": target, "skip_patterns": "default"}
        if "static" in target:
            inputs["calibration"] = ["calibrate", 0]
        first[f"quantize {target}"] = {"class_type": "SnugQuantizeModel", "inputs": inputs}
        sample(first, target, f"quantize {target}")
        inputs = {"model": [f"quantize {target}", 0], "filename_prefix": f"diffusion_models/every{number}"}
        inputs |= {"format": "auto", "if_exists": "replace", "folder": "models folder"}
        first[f"keep {target}"] = {"class_type": "SnugSaveModel", "inputs": inputs}
    written: list[Path] = []
    try:
        outputs = comfy_server.run(first)
        written = [Path(outputs[f"keep {target}"]["text"][0]) for target in TARGETS]
        for target, path in zip(TARGETS, written, strict=True):
            inputs = {"model_name": path.name, "compute_dtype": "auto"}
            second[f"load {target}"] = {"class_type": "SnugLoadDiffusionModel", "inputs": inputs}
            sample(second, target, f"load {target}")
        again = comfy_server.run(second)
        found = [saved_latent(comfy_server, outputs, f"latent {target}") for target in TARGETS]
        for target, latent in zip(TARGETS, found, strict=True):
            assert torch.equal(saved_latent(comfy_server, again, f"latent {target}"), latent), target
        different = {latent.numpy().tobytes() for latent in found}
        assert len(different) == len(TARGETS), "targets that make no difference"
    finally:
        comfy_server.free()
        for path in written:
            path.unlink(missing_ok=True)
