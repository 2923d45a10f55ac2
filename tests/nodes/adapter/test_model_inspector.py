"""The inspector beside ComfyUI's own models: estimates from headers equal what loading takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text_encoders import SmallCLIP, load_dense
from sparse_files import flux_shapes, sparse_gguf, sparse_safetensors
from twins import Twins

MakeTwins = Callable[[str, str], Twins]
FORMATS = [
    ("sd3", "Q4_0"),
    ("sd15", "Q8_0"),
    ("sdxl", "Q4_K"),
    ("wan", "Q4_K"),
    ("sd3", "nf4"),
    ("sd3", "fp8"),
    ("sd3", "int8"),
    ("sd3", "quanto-int4"),
    ("sd3", "torchao-int8"),
]


@pytest.fixture
def size() -> Any:
    from snug.nodes.adapter.computing import ImageSize

    return ImageSize(64, 64, 1)


@pytest.mark.parametrize("family, format", FORMATS)
def test_estimates_are_what_loading_takes(family: str, format: str, twins: MakeTwins, size: Any) -> None:
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.nodes.adapter.model_inspector import inspect_file, inspect_model

    path = str(twins(family, format).gguf)
    from_file = inspect_file(path, size)
    patcher = load_diffusion_model(path)
    from_model = inspect_model(patcher, size)
    assert from_file.match is not None and from_file.fit is not None and from_model.fit is not None
    assert (from_file.match.missing, from_file.match.unexpected) == ((), ())
    assert from_file.match.model == type(patcher.model).__name__
    assert from_file.fit.demand.weights == pytest.approx(patcher.model_size(), rel=0.01)
    assert from_model.fit.demand.weights == pytest.approx(patcher.model_size(), rel=0.01)
    assert from_model.nbytes == pytest.approx(patcher.model_size(), rel=0.01)
    assert from_file.fit.demand.computing == from_model.fit.demand.computing
    assert from_file.architecture == from_model.architecture
    quantized = [(use.format, use.weights) for use in from_file.formats if use.bits_per_weight < 16]
    assert quantized
    assert quantized == [(use.format, use.weights) for use in from_model.formats if use.bits_per_weight < 16]


def test_plain_files_become_the_models_dtype(twins: MakeTwins, size: Any, comfy: Any) -> None:
    from snug.nodes.adapter.model_inspector import inspect_file

    path = twins("sd3", "Q4_0").dense
    found = inspect_file(str(path), size)
    loaded = comfy.sd.load_diffusion_model(str(path))
    assert found.fit is not None
    assert found.fit.demand.weights == pytest.approx(loaded.model_size(), rel=0.01)


def test_missing_and_unexpected_tensors(twins: MakeTwins, size: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.model_inspector import inspect_file

    tensors = load_file(twins("sd3", "Q4_0").dense)
    del tensors["y_embedder.mlp.0.bias"]
    tensors["nobody.weight"] = torch.zeros(4)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    match = inspect_file(str(path), size).match
    assert match is not None
    assert match.missing == ("y_embedder.mlp.0.bias",)
    assert match.unexpected == ("nobody.weight",)


def test_stable_diffusion_2(size: Any, tmp_path: Path, comfy: Any) -> None:
    """ComfyUI looks into a tensor to tell its two kinds apart, which a header does not hold."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from snug.nodes.adapter.model_inspector import inspect_file

    network = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        num_head_channels=64,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        context_dim=1024,
        legacy=False,
        device="meta",
        operations=comfy.ops.manual_cast,
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    path = tmp_path / "sd2.safetensors"
    sparse_safetensors(path, shapes, "F16")
    match = inspect_file(str(path), size).match
    assert match is not None and (match.missing, match.unexpected) == ((), ())


def test_tensors_of_no_known_model(size: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.model_inspector import inspect_file

    path = tmp_path / "unknown.safetensors"
    save_file({"layers.0.a.weight": torch.zeros(8, 8)}, path)
    found = inspect_file(str(path), size)
    assert found.match is None and "none of the models" in found.no_match
    assert found.fit is not None and found.fit.demand.computing is None


def test_12_gb_of_flux_on_smaller_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter import model_inspector
    from snug.nodes.adapter.computing import ImageSize
    from snug.quant_backends.inspection.fit import Device

    path = tmp_path / "flux.gguf"
    sparse_gguf(path, flux_shapes(), "Q8_0")

    def fit(gigabytes: int) -> Any:
        card = Device("a card", gigabytes << 30, gigabytes << 30, 2**29, True)
        monkeypatch.setattr(model_inspector, "device_of", lambda _device: card)
        return model_inspector.inspect_file(str(path), ImageSize(512, 512, 1)).fit

    assert fit(32).offloaded == 0
    small = fit(8)
    assert len(small.demand.blocks) == 57
    assert 0 < small.offloaded < small.demand.weights
    assert "With Group Offload: " in small.streaming


def test_model_and_clip_at_once(sd3: tuple[Any, Any], size: Any) -> None:
    from snug.nodes.adapter.inspection_plot import draw
    from snug.nodes.adapter.model_inspector import NONE, inspect

    summaries, text, as_json = inspect(sd3[0], None, NONE, size)
    assert "MODEL: SD3" in text
    assert json.loads(as_json)[0]["architecture"] == "sd3"
    one, two = draw(summaries), draw([*summaries, *summaries])
    assert one.dtype == torch.float32 and one.shape[0] == 1 and one.shape[3] == 3
    assert two.shape[1] == 2 * one.shape[1]
    assert one.min() >= 0 and one.max() <= 1 and one.std() > 0.05


def test_clip(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from snug.nodes.adapter.model_inspector import inspect_clip

    path = tmp_path / "clip.safetensors"
    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), path)
    clip = load_dense(comfy, path, "stable_diffusion")
    found = inspect_clip(clip)
    assert found.nbytes == pytest.approx(clip.patcher.model_size(), rel=0.01)
    assert found.fit is not None and found.fit.demand.weights == pytest.approx(found.nbytes, rel=0.01)
    assert any("encoder.layers" in group.name for group in found.groups)


def test_what_would_make_the_cpu_faster(
    twins: MakeTwins, size: Any, monkeypatch: pytest.MonkeyPatch, comfy: Any
) -> None:
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.nodes.adapter.model_inspector import inspect_model
    from snug.quant_backends.kernels import native

    patcher = load_diffusion_model(str(twins("sd3", "Q4_0").gguf))
    monkeypatch.setattr(native, "_library", lambda: None)
    [note] = inspect_model(patcher, size).notes
    assert "pip install libgguf" in note
    monkeypatch.setattr(native, "_library", lambda: native)
    assert not inspect_model(patcher, size).notes


def test_nothing_to_inspect(size: Any) -> None:
    from snug.nodes.adapter.model_inspector import NONE, find_file, inspect
    from snug.quant_backends.core.errors import SnugError

    with pytest.raises(SnugError, match="connect a model or a clip, or choose a file"):
        inspect(None, None, NONE, size)
    for choice in ("elsewhere/model.gguf", "loras/../../secret.safetensors", "loras/gone.gguf"):
        with pytest.raises(SnugError):
            find_file(choice)
