"""The inspector as an output node of a running server."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from comfy_server import ComfyServer, WorkflowError
from PIL import Image
from twins import Twins
from workflows import Workflow

pytestmark = pytest.mark.comfy


def inspecting(file: str, **links: object) -> Workflow:
    """The node with all its outputs used; the report is in outputs["inspector"]["text"]."""
    inputs = {"file": file, "width": 512, "height": 512, "batch_size": 1, **links}
    return {
        "inspector": {"class_type": "SnugModelInspector", "inputs": inputs},
        "json": {"class_type": "PreviewAny", "inputs": {"source": ["inspector", 1]}},
        "image": {
            "class_type": "SaveImage",
            "inputs": {"images": ["inspector", 2], "filename_prefix": "inspector"},
        },
    }


def test_a_file_and_the_model_loaded_from_it(
    twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    file = twins("sd3", "Q4_0").gguf
    workflow = inspecting(f"diffusion_models/{file.name}", model=["model", 0])
    inputs = {"model_name": file.name, "compute_dtype": "auto"}
    workflow["model"] = {"class_type": "SnugLoadDiffusionModel", "inputs": inputs}
    outputs = comfy_server.run(workflow)
    (report,) = outputs["inspector"]["text"]
    assert "MODEL: SD3" in report and f"File: {file.name}" in report
    from_model, from_file = json.loads(outputs["json"]["text"][0])
    assert from_model["fit"]["weights"] == pytest.approx(from_file["fit"]["weights"], rel=0.01)
    assert from_file["match"] == {"model": "SD3", "missing": [], "unexpected": []}
    image = Image.open(io.BytesIO(comfy_server.view(outputs["image"]["images"][0])))
    assert image.width >= 1000 and len(image.convert("RGB").getcolors(2**24) or []) > 10


def test_errors_are_sentences(twins: Callable[[str, str], Twins], comfy_server: ComfyServer) -> None:
    with pytest.raises(WorkflowError, match="connect a model or a clip, or choose a file"):
        comfy_server.run(inspecting("none"))
    file = twins("sd3", "Q8_0").gguf
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WorkflowError, match="the file ends at") as caught:
        comfy_server.run(inspecting(f"diffusion_models/{file.name}"))
    assert caught.value.node_type == "SnugModelInspector" and "\n" not in str(caught.value)
