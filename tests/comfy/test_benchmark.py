"""Benchmark (Snug) in a running server: models of two loaders, a file, and what it made decoded to digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from comfy_server import ComfyServer
from digits import TEXT_ENCODER_TYPE, WEIGHTS, make_digits_text_encoder, make_digits_vae
from tiny import use_comfyui

pytestmark = pytest.mark.comfy


def test_dense_beside_quantized(comfy_server: ComfyServer, comfyui_path: Path) -> None:
    use_comfyui(comfyui_path)
    models = comfy_server.base / "models"
    (models / "diffusion_models").mkdir(parents=True, exist_ok=True)
    shutil.copy(WEIGHTS, models / "diffusion_models" / "digits.safetensors")
    make_digits_vae(models / "vae" / "digits-vae.safetensors")
    make_digits_text_encoder(models / "text_encoders" / "digits-t5.safetensors")

    def node(class_type: str, **inputs: object) -> dict[str, object]:
        return {"class_type": class_type, "inputs": inputs}

    shared = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    sampling = {
        "seed": 5,
        "steps": 4,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    workflow = {
        "dense": node("UNETLoader", unet_name="digits.safetensors", weight_dtype="default"),
        "quantized": node(
            "SnugQuantizeModel", model=["dense", 0], target="GGUF Q8_0", skip_patterns="default"
        ),
        "clip": node("CLIPLoader", clip_name="digits-t5.safetensors", type=TEXT_ENCODER_TYPE),
        "positive": node("SnugTestDigits", clip=["clip", 0], digits="27"),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text=""),
        "latent": node("EmptyHunyuanLatentVideo", width=64, height=64, length=1, batch_size=2),
        "vae": node("VAELoader", vae_name="digits-vae.safetensors"),
        "benchmark": node(
            "SnugBenchmark",
            model=["dense", 0],
            model_2=["quantized", 0],
            vae=["vae", 0],
            runs=2,
            warmup=1,
            captions="dense",
            save_as="JSON",
            filename_prefix="snug/test",
            **shared,
            **sampling,
        ),
        "decode": node("VAEDecode", samples=["benchmark", 4], vae=["vae", 0]),
        "pictures": node("SaveImage", images=["decode", 0], filename_prefix="digits"),
        "plot": node("SaveImage", images=["benchmark", 1], filename_prefix="plot"),
    }
    outputs = comfy_server.run(workflow)
    report = outputs["benchmark"]["text"][0]
    assert "dense" in report and "Q8_0" in report
    path = comfy_server.base / "output" / report.rpartition("Saved as ")[2]
    first, second = json.loads(path.read_text(encoding="utf-8"))["models"]
    assert len(first["steps"]) == len(second["steps"]) == 2 * 3
    assert second["weights"] < first["weights"] and 0 < second["error"] < 0.05 and second["ssim"] > 0.98
    assert len(outputs["pictures"]["images"]) == 4 and len(outputs["plot"]["images"]) == 1
