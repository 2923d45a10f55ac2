"""Calibrating, quantizing with the result and sampling, between the stock nodes of a running server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from comfy_server import ComfyServer
from snug.quant_backends.quantization.calibration import load_calibration
from twins import Twins
from workflows import build_workflow, saved_latent

pytestmark = pytest.mark.comfy


def test_calibrate_quantize_sample_and_load_again(
    twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    file = twins("sd3", "F16").gguf.name
    plain = build_workflow("sd3", "snug", file, steps=2)
    exact = saved_latent(comfy_server, comfy_server.run(plain))

    workflow = build_workflow("sd3", "snug", file, steps=2)
    sampler = workflow["sampler"]["inputs"]
    shared = {
        key: sampler[key] for key in ("positive", "negative", "cfg", "sampler_name", "scheduler", "steps")
    }
    inputs = {**shared, "model": ["model", 0], "latent_image": ["latent", 0], "seed": 7}
    workflow["calibrate"] = {
        "class_type": "SnugCalibrate",
        "inputs": {**inputs, "positive_2": ["negative", 0], "save_as": "served"},
    }
    settings = {"target": "INT8 static", "skip_patterns": "default", "calibration": ["calibrate", 0]}
    workflow["quantize"] = {"class_type": "SnugQuantizeModel", "inputs": {"model": ["model", 0], **settings}}
    workflow["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["quantize", 1]}}
    sampler["model"] = ["quantize", 0]
    outputs = comfy_server.run(workflow)
    calibrated = saved_latent(comfy_server, outputs)
    assert "(2 samples, 4 steps, 4 calls)" in outputs["calibrate"]["text"][0]
    assert "in product-int8-static" in outputs["report"]["text"][0]
    assert 1e-4 < ((calibrated - exact).norm() / exact.norm()).item() < 0.2

    path = comfy_server.base / "models" / "snug_calibrations" / "served.safetensors"
    assert "joint_blocks.0.x_block.mlp.fc1" in load_calibration(path).layers
    workflow["calibrate"] = {
        "class_type": "SnugLoadCalibration",
        "inputs": {"calibration_name": "served.safetensors"},
    }
    again = saved_latent(comfy_server, comfy_server.run(workflow))
    assert again.equal(calibrated)
