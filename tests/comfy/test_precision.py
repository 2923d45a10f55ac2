"""Precision between the stock nodes of one server: two settings in one workflow, and nothing left without the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from tiny import make_tiny_vae
from twins import Twins
from workflows import SETUPS, Workflow, build_workflow, saved_latent, with_node

pytestmark = pytest.mark.comfy

SETTINGS = {
    "compute_dtype": "auto",
    "fp32_islands": True,
    "attention_backend": "ComfyUI's choice",
    "attention_slicing": "off",
    "fuse_qkv": False,
}


def with_precision(workflow: Workflow, **settings: Any) -> Workflow:
    return with_node(workflow, "model", "precision", "SnugPrecision", **{**SETTINGS, **settings})


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("loader", "family"), [("snug", "sd15"), ("dense", "sd3")])
def test_in_and_out_of_a_workflow(
    loader: Any, family: str, twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    setup = SETUPS[family]
    assert setup.vae is not None
    make_tiny_vae(comfy_server.base / "models" / "vae_approx", setup.vae)
    found = twins(family, "Q8_0")
    file = found.gguf.name if loader == "snug" else found.dense.name

    def build() -> Workflow:
        return build_workflow(family, loader, file, steps=2, decode=True)

    plain = saved_latent(comfy_server, comfy_server.run(build()))
    half = {
        "compute_dtype": "bf16",
        "attention_backend": "pytorch",
        "attention_slicing": "2",
        "fuse_qkv": True,
    }
    workflow = with_precision(build(), **half)
    # A second sampler with other settings of the same model, and the VAE in its own.
    workflow["sharp"] = {
        "class_type": "SnugPrecision",
        "inputs": {"model": ["model", 0], **SETTINGS, "compute_dtype": "fp32"},
    }
    workflow["sampler_2"] = {
        "class_type": "KSampler",
        "inputs": {**workflow["sampler"]["inputs"], "model": ["sharp", 0]},
    }
    workflow["save_2"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["sampler_2", 0], "filename_prefix": "sharp"},
    }
    workflow["vae_bf16"] = {
        "class_type": "SnugPrecisionVAE",
        "inputs": {"vae": ["vae", 0], "compute_dtype": "bf16"},
    }
    workflow["decode"]["inputs"]["vae"] = ["vae_bf16", 0]
    outputs = comfy_server.run(workflow)
    assert outputs["report"]["text"][0].startswith("calculates in bfloat16; ")
    assert outputs["image"]["images"]
    assert 1e-4 < error(saved_latent(comfy_server, outputs), plain) < 0.1
    assert error(saved_latent(comfy_server, {"save": outputs["save_2"]}), plain) < 1e-4
    assert saved_latent(comfy_server, comfy_server.run(build())).equal(plain), "something was left"


def test_an_attention_that_is_not_here(twins: Callable[[str, str], Twins], comfy_server: ComfyServer) -> None:
    workflow = build_workflow("sd3", "snug", twins("sd3", "Q4_0").gguf.name, steps=1)
    with pytest.raises(
        WorkflowError, match=r"'sage' is not available .* choose one of ComfyUI's choice, pytorch"
    ):
        comfy_server.run(with_precision(workflow, attention_backend="sage"))
