"""Folders that diffusers has written sample in the real ComfyUI as the same weights, dense, in one file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from diffusers_folders import save_folder
from diffusers_models import tiny_diffusers_model
from safetensors.torch import save_file
from snug.quant_backends.readers.diffusers_names import to_original_names
from workflows import build_workflow, saved_latent

pytestmark = pytest.mark.comfy

SHARD_BYTES = 1 << 20
TOLERANCE = 2e-5
CASES = [
    *((family, None) for family in ("flux", "sd3", "wan", "sdxl", "qwen_image")),
    *(
        (family, kind)
        for family in ("flux", "sd3", "wan")
        for kind in ("nf4-nested", "torchao-int8", "quanto-int8")
    ),
    ("sdxl", "nf4-nested"),
]


@pytest.fixture
def folder(comfy_server: ComfyServer) -> Iterator[Callable[[str, str | None], tuple[str, str]]]:
    """folder(family, kind): names of a sharded folder and of its dense twin, for one test."""
    root = comfy_server.base / "models" / "diffusion_models"
    root.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []

    def make(family: str, kind: str | None) -> tuple[str, str]:
        path = root / f"{family}-{kind or 'plain'}"
        twin = root / f"{path.name}.safetensors"
        made.extend((path, path.with_name(f"{path.name}-dense"), twin))
        weights = save_folder(tiny_diffusers_model(family), path, kind, SHARD_BYTES)
        named = to_original_names({name: value.float() for name, value in weights.items()})
        dense = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        save_file({name: value.contiguous() for name, value in dense.items()}, twin)
        return f"{path.name}/", twin.name

    yield make
    comfy_server.free()
    for path in made:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_latents_equal_the_dense_file(
    family: str,
    kind: str | None,
    folder: Callable[[str, str | None], tuple[str, str]],
    comfy_server: ComfyServer,
) -> None:
    name, twin = folder(family, kind)
    workflows = [
        build_workflow(family, "snug", name, steps=2),
        build_workflow(family, "dense", twin, steps=2),
    ]
    latents = [saved_latent(comfy_server, comfy_server.run(workflow)) for workflow in workflows]
    assert latents[0].isfinite().all() and latents[0].std() > 0.01
    assert (latents[0] - latents[1]).norm() < TOLERANCE * latents[1].norm()


def test_a_missing_shard_is_named(
    folder: Callable[[str, str | None], tuple[str, str]], comfy_server: ComfyServer
) -> None:
    name, _ = folder("sd3", None)
    root = comfy_server.base / "models" / "diffusion_models" / name
    shard = max(root.glob("*-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(WorkflowError, match=shard.name) as caught:
        comfy_server.run(build_workflow("sd3", "snug", name))
    assert "\n" not in str(caught.value)
