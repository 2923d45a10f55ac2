"""torch.compile traces packed models like dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize("format", ["Q4_0", "Q4_K", "nf4-nested", "fp8-rows"])
def test_compile(format: str, twins: Any, model: Any) -> None:
    """Through AOTAutograd (every backend but "eager"), with no more graph breaks than the dense model."""
    import comfy.model_management
    from torch._dynamo.utils import counters

    breaks = []
    for patcher in twins("sd3", format).load():
        torch._dynamo.reset()
        counters.clear()
        comfy.model_management.load_models_gpu([patcher])
        network = patcher.model.diffusion_model
        with torch.inference_mode():
            wanted = model.run(patcher)
            network.forward = torch.compile(network.forward, backend="aot_eager")
            assert torch.allclose(model.run(patcher), wanted, atol=1e-5)
        breaks.append(sum(counters["graph_break"].values()))
    packed, dense = breaks
    assert packed <= dense
