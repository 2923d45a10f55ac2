"""The benchmark on a CUDA device: memory is the device's, and steps are waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digits import LATENT, WEIGHTS, prompts
from tiny import use_comfyui

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def comfy(comfyui_path: Path) -> None:
    use_comfyui(comfyui_path)


def test_memory_and_steps_are_the_devices() -> None:
    import comfy.sd
    from comfy.patcher_extension import WrappersMP
    from snug.nodes.adapter.sampling import Sampling
    from snug.nodes.measure.benchmark import Plan, benchmark

    model = comfy.sd.load_diffusion_model(str(WEIGHTS))
    cycles, taken = 200_000_000, 256 << 20

    def slow(executor, *args, **kwargs):  # the device works on, long after this has returned
        torch.empty(taken, dtype=torch.uint8, device=args[0].device)
        torch.cuda._sleep(cycles)
        return executor(*args, **kwargs)

    busy = model.clone()
    busy.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "slow", slow)
    conditioning = ([[prompts([3]), {}]], [[prompts([10]), {}]])
    plan = Plan(Sampling(1, 4, 1.0, "euler", "simple"), runs=2)
    (plain, other), _ = benchmark(
        [("plain", model), ("busy", busy)], conditioning, {"samples": torch.zeros(1, *LATENT)}, plan
    )
    assert plain.device.startswith("cuda")
    assert plain.memory is not None and plain.peak is not None and other.peak is not None
    assert plain.weights is not None and plain.memory >= plain.weights > 0
    assert other.peak - plain.peak > 0.9 * taken
    # Every step waits for its sleep, which no clock of a GPU makes shorter: handing work over takes far less.
    assert min(other.steps) > cycles / 4e9
