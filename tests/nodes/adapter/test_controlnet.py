"""A real (tiny) ControlNet steers a packed model exactly as it steers the dense twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import FAMILIES


@pytest.fixture(scope="module")
def control(comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ControlNet with random weights for the tiny SD1.5, through ComfyUI's loader."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {
        key: value
        for key, value in FAMILIES["sd15"].config.items()
        if key not in ("out_channels", "transformer_depth_output")
    }
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(value.shape, generator=generator) * 0.05
        for name, value in network.state_dict().items()
    }
    path: Path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file(weights, path)
    return comfy.controlnet.load_controlnet(str(path))


def sample(patcher: Any, control: Any) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(4)
    context = torch.randn(1, 77, 768, generator=generator)
    hint = torch.rand(1, 3, 64, 64, generator=generator)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    options: dict[str, Any] = {}
    if control is not None:
        options = {
            "control": control.copy().set_cond_hint(hint, 0.9, (0.0, 1.0)),
            "control_apply_to_uncond": True,
        }
    conditioning = [[context, options]]
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        patcher,
        noise,
        2,
        2.0,
        "euler",
        "normal",
        conditioning,
        conditioning,
        latent,
        disable_pbar=True,
        seed=0,
    )


def test_controlnet(sd15: Any, control: Any, model: Any) -> None:
    packed, dense = ([sample(patcher, with_it) for with_it in (control, None)] for patcher in sd15)
    wanted = dense[0] - dense[1]
    assert wanted.norm() > 0.02 * dense[1].norm(), "the ControlNet does nothing"
    assert model.relative_error(packed[0] - packed[1], wanted) < 0.001
