"""Calibrate (Snug) and its kin: what reaches the layers of a model while it makes images of one's own prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.calibration import (
    Keep,
    calibrate_clip,
    calibrate_model,
    open_calibration,
)
from .adapter.folders import CALIBRATIONS, state_on_disk
from .adapter.sampling import Sampling
from .sampling_inputs import sampling_inputs

Calibration = io.Custom("SNUG_CALIBRATION")
MORE_PROMPTS = ("positive_2", "positive_3", "positive_4")


def _keep_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "save_as",
            default="",
            optional=True,
            tooltip=(
                "Name of a file in models/snug_calibrations to save the result in, for Load Calibration (Snug); a "
                "number is added if the name is taken. Empty: it is not saved."
            ),
        ),
        Calibration.Input(
            "previous",
            optional=True,
            tooltip="An earlier calibration of the same model that this one is added to: chain nodes for more prompts.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        Calibration.Output(
            display_name="calibration",
            tooltip="For the calibration input of Quantize Model (Snug) and the like.",
        ),
        io.String.Output(
            display_name="report", tooltip="What was recorded, and which layers have the largest outliers."
        ),
    ]


class SnugCalibrate(io.ComfyNode):
    """Samples like KSampler and records; the images are thrown away."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugCalibrate",
            display_name="Calibrate (Snug)",
            category="Snug/quantize",
            description=(
                "Samples with your own prompts and settings and records what reaches each layer: its range and which "
                "channels matter. Quantizing with it loses less, and INT8 static needs it. Takes as long as making "
                "the images."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The diffusion model, quantized or not, with the LoRAs it is used with. It is not changed.",
                ),
                io.Conditioning.Input("positive", tooltip="A prompt of the kind that the model is used for."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, for all of them."),
                io.Latent.Input(
                    "latent_image", tooltip="As for KSampler: the size and number of the images."
                ),
                *sampling_inputs(
                    "Of the noise of the first prompt; each further prompt takes the next number.",
                    "Steps for each prompt, as you sample with.",
                ),
                *(
                    io.Conditioning.Input(
                        name, optional=True, tooltip="One more prompt to sample; different ones teach more."
                    )
                    for name in MORE_PROMPTS
                ),
                *_keep_inputs(),
                io.Boolean.Input(
                    "measure_sensitivity",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Also measures how much the image depends on each layer, which makes fit_gb of Quantize Model "
                        "(Snug) much better. Takes three more steps for each layer: some minutes for a large model."
                    ),
                ),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: Any,
        negative: Any,
        latent_image: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        save_as: str = "",
        previous: Any = None,
        measure_sensitivity: bool = False,
        **more: Any,
    ) -> io.NodeOutput:
        positives = [positive, *(more[name] for name in MORE_PROMPTS if more.get(name) is not None)]
        sampling = Sampling(seed, steps, cfg, sampler_name, scheduler, denoise)
        found, report = calibrate_model(
            model, positives, negative, latent_image, sampling, Keep(save_as, previous), measure_sensitivity
        )
        return io.NodeOutput(found, report, ui={"text": (report,)})


class SnugCalibrateTextEncoder(io.ComfyNode):
    """Encodes prompts and records."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugCalibrateTextEncoder",
            display_name="Calibrate Text Encoder (Snug)",
            category="Snug/quantize",
            description=(
                "Encodes your own prompts and records what reaches each layer of the text encoders. Quantizing them "
                "with it loses less."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, quantized or not. They are not changed."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    placeholder="one prompt a line",
                    default="",
                    tooltip="Prompts of the kind that you use, one a line; ten to a hundred do.",
                ),
                *_keep_inputs(),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, clip: io.Clip.Type, prompts: str, save_as: str = "", previous: Any = None
    ) -> io.NodeOutput:
        found, report = calibrate_clip(clip, prompts, Keep(save_as, previous))
        return io.NodeOutput(found, report, ui={"text": (report,)})


class SnugLoadCalibration(io.ComfyNode):
    """A calibration that was saved before."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugLoadCalibration",
            display_name="Load Calibration (Snug)",
            category="Snug/quantize",
            description="Loads a calibration that Calibrate (Snug) has saved in models/snug_calibrations.",
            inputs=[
                io.Combo.Input(
                    "calibration_name",
                    options=CALIBRATIONS.choices(CALIBRATIONS.files()),
                    tooltip="A file in models/snug_calibrations. It belongs to the model it was recorded with.",
                )
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, calibration_name: str) -> Any:
        return state_on_disk(CALIBRATIONS.find(calibration_name))

    @classmethod
    def execute(cls, calibration_name: str) -> io.NodeOutput:
        return io.NodeOutput(*open_calibration(calibration_name))
