"""Benchmark (Snug): how fast, how large and how exact models are, side by side."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter.sampling import Sampling
from .measure.benchmark import Plan, benchmark
from .measure.benchmark_report import as_csv, as_json, draw, report_text
from .sampling_inputs import sampling_inputs
from .telemetry.diagnostics import environment
from .telemetry.monitor import CSV, JSON, NOTHING, save

MORE_MODELS = tuple(f"model_{number}" for number in range(2, 9))


class SnugBenchmark(io.ComfyNode):
    """Samples; the models are not changed, and are unloaded before and after."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugBenchmark",
            display_name="Benchmark (Snug)",
            category="Snug/speed",
            description=(
                "Samples several times with each model and compares them: time to load and per step, memory, compile "
                "time, and how far each result is from the first model's. As text, picture and file."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the others are compared with, from any loader or node."
                ),
                io.Conditioning.Input("positive", tooltip="The prompt, as for KSampler."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, as for KSampler."),
                io.Latent.Input(
                    "latent_image", tooltip="As for KSampler: the size and number of the images."
                ),
                *sampling_inputs(
                    "Of the noise, the same in every run. Another number measures again.",
                    "Steps of each run; the first one does not count.",
                ),
                io.Int.Input("runs", default=3, min=1, max=100, tooltip="Runs of each model that count."),
                io.Int.Input(
                    "warmup",
                    default=1,
                    min=0,
                    max=10,
                    tooltip=(
                        "Runs of each model before those that count: the first loads the model, compiles it and fills "
                        "caches."
                    ),
                ),
                *(
                    io.Model.Input(
                        name,
                        optional=True,
                        tooltip="One more model to compare, of the same kind as the first.",
                    )
                    for name in MORE_MODELS
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="A name for each model, one a line. Empty: the formats of its weights.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="With it, the results are compared as pictures as well (PSNR and SSIM).",
                ),
                io.Combo.Input(
                    "save_as",
                    options=[NOTHING, CSV, JSON],
                    default=NOTHING,
                    optional=True,
                    tooltip="Also write the numbers to a file: CSV a line per model, JSON every step.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="snug/benchmark",
                    optional=True,
                    tooltip="The file's name below ComfyUI's output folder; a number is added to it.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A table with a line for each model."),
                io.Image.Output(display_name="plot", tooltip="The same as bars."),
                io.String.Output(
                    display_name="json", tooltip="All numbers, in seconds and bytes, with the environment."
                ),
                io.String.Output(display_name="csv", tooltip="A line for each model, in seconds and bytes."),
                io.Latent.Output(
                    display_name="samples", tooltip="What the models made, in their order, as one batch."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        runs: int,
        warmup: int,
        denoise: float = 1.0,
        captions: str = "",
        vae: Any = None,
        save_as: str = NOTHING,
        filename_prefix: str = "snug/benchmark",
        **more: Any,
    ) -> io.NodeOutput:
        plan = Plan(Sampling(seed, steps, cfg, sampler_name, scheduler, denoise), runs, warmup)
        given = [model, *(more.get(name) for name in MORE_MODELS)]
        names = [line.strip() for line in captions.splitlines()]
        names += [""] * (len(given) - len(names))
        # A caption belongs to the input with its number, also where inputs before it are not connected.
        models = [(name, one) for name, one in zip(names, given, strict=False) if one is not None]
        rows, samples = benchmark(models, (positive, negative), latent_image, plan, vae)
        report, data, lines = report_text(rows, plan), as_json(rows, plan, environment()), as_csv(rows)
        if save_as != NOTHING:
            name = save(filename_prefix, f".{save_as.lower()}", lines if save_as == CSV else data)
            report += f"\n\nSaved as {name}"
        return io.NodeOutput(report, draw(rows, plan), data, lines, samples, ui={"text": (report,)})
