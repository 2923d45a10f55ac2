"""The node classes, one file each. They read their inputs, call the adapter and return."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

logger = logging.getLogger("snug")


class SnugExtension(ComfyExtension):
    async def on_load(self) -> None:
        from . import replacements

        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .benchmark import SnugBenchmark
        from .blind_test import SnugBlindTest
        from .calibrate import SnugCalibrate, SnugCalibrateTextEncoder, SnugLoadCalibration
        from .compare_images import SnugCompareImages
        from .fast_matmul import SnugFastMatmul
        from .group_offload import SnugGroupOffload, SnugGroupOffloadCLIP
        from .layerwise_casting import SnugLayerwiseCasting, SnugLayerwiseCastingCLIP
        from .load_checkpoint import SnugLoadCheckpoint
        from .load_controlnet import SnugLoadControlNet
        from .load_diffusion_model import SnugLoadDiffusionModel
        from .load_lora import SnugLoadLora
        from .load_text_encoders import SnugLoadTextEncoders
        from .lora_mode import SnugLoraMode
        from .memory_budget import SnugMemoryBudget
        from .model_inspector import SnugModelInspector
        from .precision import SnugPrecision, SnugPrecisionCLIP, SnugPrecisionVAE
        from .quantize import SnugQuantizeModel, SnugQuantizeTextEncoder
        from .save import SnugSaveModel, SnugSaveTextEncoder
        from .spare_memory_cache import SnugSpareMemoryCache
        from .torch_compile import SnugTorchCompile
        from .vram_monitor import SnugVRAMMonitor

        return [
            SnugLoadDiffusionModel,
            SnugLoadTextEncoders,
            SnugLoadCheckpoint,
            SnugLoadLora,
            SnugLoadControlNet,
            SnugQuantizeModel,
            SnugQuantizeTextEncoder,
            SnugSaveModel,
            SnugSaveTextEncoder,
            SnugLayerwiseCasting,
            SnugLayerwiseCastingCLIP,
            SnugGroupOffload,
            SnugGroupOffloadCLIP,
            SnugTorchCompile,
            SnugPrecision,
            SnugPrecisionCLIP,
            SnugPrecisionVAE,
            SnugLoraMode,
            SnugFastMatmul,
            SnugSpareMemoryCache,
            SnugMemoryBudget,
            SnugModelInspector,
            SnugVRAMMonitor,
            SnugCompareImages,
            SnugBlindTest,
            SnugCalibrate,
            SnugCalibrateTextEncoder,
            SnugLoadCalibration,
            SnugBenchmark,
        ]


def create_extension() -> ComfyExtension:
    """The pack as ComfyUI sees it; registers the folder keys that the nodes list files from, and its routes.

    Re-raises whatever goes wrong after logging it: ComfyUI reports a failing entry point without traceback.
    """
    try:
        from .adapter import folders
        from .measure import blind_routes
        from .telemetry import routes

        folders.register()
        routes.register_routes()
        blind_routes.register_routes()
        return SnugExtension()
    except Exception:
        logger.exception("ComfyUI-Snug could not start.")
        raise
