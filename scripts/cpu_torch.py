"""Make torchvision and torchaudio importable beside a CPU build of torch.

On Linux the wheels published on PyPI link CUDA's libraries, so beside a CPU torch ``import torchvision`` fails at
its fake for an operator that was never declared and ``import torchaudio`` fails at its extension. ComfyUI imports
both but needs neither's compiled code for anything the tests do. Nothing is faked here: calling
``torchvision.ops.nms`` still raises.

This module is also the hook itself: it is copied into the environment and imported through a ``.pth`` file.
"""

from __future__ import annotations

import importlib.abc
import shutil
import sys
from pathlib import Path
from typing import Any

HOOK_NAME = "_snug_torchvision_schemas"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Declares the two operator schemas right before torchvision is imported for the first time."""

    library: Any = None  # the schemas vanish with the Library object that declared them

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                self.library.define(schema)


def install() -> None:
    """Called by the ``.pth`` file, which Python may read more than once."""
    if not any(isinstance(finder, TorchvisionSchemas) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionSchemas())


def repair(site_packages: Path) -> None:
    """Repair an environment whose torch is a CPU build; ``site_packages`` is its package folder."""
    for library in (site_packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()  # its own loader then reports that there is no extension and goes on
    shutil.copyfile(__file__, site_packages / f"{HOOK_NAME}.py")
    (site_packages / f"{HOOK_NAME}.pth").write_text(f"import {HOOK_NAME}; {HOOK_NAME}.install()\n")
