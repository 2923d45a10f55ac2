"""Group offloading between the stock nodes of a real server. Its CPU copies nothing; all else is as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from twins import Twins
from workflows import build_workflow, saved_latent, with_offload

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_are_those_without_it(
    comfy_server: ComfyServer, twins: Callable[[str, str], Twins], family: str
) -> None:
    file = twins(family, "Q8_0").gguf.name
    plain = saved_latent(comfy_server, comfy_server.run(build_workflow(family, "snug", file)))
    for settings in ({}, {"level": "single layers", "prefetch": "2"}, {"limit_gb": 2.0}):
        outputs = comfy_server.run(with_offload(build_workflow(family, "snug", file), "model", **settings))
        assert torch.equal(saved_latent(comfy_server, outputs), plain)
        report = outputs["report"]["text"][0]
        assert report.startswith("This model runs on the CPU")
        assert ("stay on the GPU" if "limit_gb" in settings else "are streamed") in report
    again = comfy_server.run(build_workflow(family, "snug", file, output="again"))
    assert torch.equal(saved_latent(comfy_server, again), plain)


def test_too_low_a_limit_is_told(comfy_server: ComfyServer, twins: Callable[[str, str], Any]) -> None:
    workflow = build_workflow("sd3", "dense", twins("sd3", "Q8_0").dense.name)
    with pytest.raises(WorkflowError, match="GPU memory.*allow"):
        comfy_server.run(with_offload(workflow, "model", limit_gb=0.001))
