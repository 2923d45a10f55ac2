"""Features as nodes of one running server: alone, in pairs, all at once, and two settings of each in one workflow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import error
from comfy_server import ComfyServer
from feature_nodes import LORA, NODES, add_features, add_sampler, write_rounded
from tiny import make_tiny_lora
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent

pytestmark = pytest.mark.comfy

CHAINS = [
    *((name,) for name in NODES),
    *itertools.combinations(NODES, 2),
    tuple(NODES),
    tuple(reversed(NODES)),
]
TOLERANCE = 1e-4


class Bench:
    """One quantized file, or the dense one, in the server's folders, with what the results are compared with."""

    def __init__(self, server: ComfyServer, family: str, pair: Twins, is_dense: bool, source: Path) -> None:
        self._server, self._family, self._is_dense, self._pair = server, family, is_dense, pair
        folder = server.base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        make_tiny_lora(source, folder / LORA, seed=3)
        self._rounded = pair.dense.with_name(f"{pair.dense.stem}-rounded.safetensors")
        write_rounded(pair.dense if is_dense else pair.gguf, pair.dense, self._rounded)
        self._expected: dict[tuple[str, ...], torch.Tensor] = {}

    def workflow(self, features: tuple[str, ...] = (), setting: int = 0, seed: int = 1) -> Workflow:
        file = self._pair.dense if self._is_dense else self._pair.gguf
        loader = "dense" if self._is_dense else "snug"
        return add_features(
            build_workflow(self._family, loader, file.name, steps=2, seed=seed), features, setting
        )

    def run(self, features: tuple[str, ...] = (), setting: int = 0, seed: int = 1) -> torch.Tensor:
        return saved_latent(self._server, self._server.run(self.workflow(features, setting, seed)))

    def expected(self, features: tuple[str, ...]) -> torch.Tensor:
        """What ComfyUI alone gives for the same weights, with the first setting of each feature."""
        lora = tuple(name for name in features if name == "lora")
        file = self._rounded if "casting" in features else self._pair.dense
        key = (file.name, *lora)
        if key not in self._expected:
            workflow = add_features(build_workflow(self._family, "dense", file.name, steps=2), lora)
            self._expected[key] = saved_latent(self._server, self._server.run(workflow))
        return self._expected[key]

    def close(self) -> None:
        self._server.free()
        self._rounded.unlink()


@pytest.fixture
def bench(comfy_server: ComfyServer, twins: Any, source: Callable[[str], Path]) -> Any:
    made: list[Bench] = []

    def make(family: str, format: str) -> Bench:
        pair = twins(family, "Q8_0" if format == "dense" else format)
        made.append(Bench(comfy_server, family, pair, format == "dense", source(family)))
        return made[-1]

    yield make
    for item in made:
        item.close()


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("sd3", "Q4_K"),
        ("sd3", "nf4"),
        ("sd3", "int8"),
        ("sd3", "fp8-rows"),
        ("sd3", "dense"),
        ("flux", "Q4_K"),
    ],
)
def test_equals_what_comfyui_gives_and_is_undone(family: str, format: str, bench: Any) -> None:
    models = bench(family, format)
    before = models.run()
    for features in CHAINS if family == "sd3" else CHAINS[-2:]:
        assert error(models.run(features), models.expected(features)) < TOLERANCE, features
    assert torch.equal(models.run(), before)


@pytest.mark.parametrize(("family", "format"), [("sd3", "nf4"), ("sd15", "dense")])
def test_different_settings_in_one_workflow(
    family: str, format: str, bench: Any, comfy_server: ComfyServer
) -> None:
    """Two settings and the plain model sampled in turns, each with two seeds."""
    models = bench(family, format)
    variants = [((), 0), (tuple(NODES), 0), (tuple(NODES), 1)]
    runs = [(features, setting, seed) for seed in (1, 2) for features, setting in variants]
    alone = [models.run(*run) for run in runs]
    for first, second in itertools.combinations(alone[:3], 2):
        assert error(first, second) > 1e-3
    workflow = models.workflow()
    for number, run in enumerate(runs):
        add_sampler(workflow, models.workflow(*run), f"_{number}")
    outputs = comfy_server.run(workflow)
    for number, latent in enumerate(alone):
        assert torch.equal(saved_latent(comfy_server, {"save": outputs[f"save_{number}"]}), latent), runs[
            number
        ]
