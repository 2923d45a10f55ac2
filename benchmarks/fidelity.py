"""What quantizing does to pictures: a tiny model that draws digits, dense and in every format, with the same seeds.

    python benchmarks/fidelity.py --markdown benchmarks/results/fidelity.md --json benchmarks/results/fidelity.json

The model is tests/assets/digits-wan.safetensors (`scripts/train_digits.py`). Recognised is the share of digits that a
classifier of real ones takes for what was asked for. PSNR is over all pixels of all pictures, SSIM the mean of the
pictures, both against what the dense model draws; the error is that of the latents (L2 norms). MB is the model in
memory, where layers that stay precise weigh more than in a large one. README's table is made from the JSON file by
`scripts/figure_tables.py`. Needs a ComfyUI: --comfyui, or $SNUG_COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from digits import CLASSES, WEIGHTS, Judge, latents, real_digits  # noqa: E402
from digits.drawing import GUIDANCE, STEPS, draw  # noqa: E402
from digits.vae import decode  # noqa: E402
from snug_path import register_snug  # noqa: E402
from tiny import use_comfyui  # noqa: E402

SEED = 7
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Row:
    """accuracy: from 0 to 1; psnr: dB, None where pictures are identical; nbytes: of the model in memory."""

    target: str
    nbytes: int
    accuracy: float
    psnr: float | None
    ssim: float
    error: float


class Fidelity:
    """Draws with models and compares with what the first one drew. each: digits of every class."""

    def __init__(self, each: int) -> None:
        self.classes = torch.arange(CLASSES).repeat(each)
        pixels, real = real_digits()
        self.judge = Judge(decode(latents(pixels)), real)
        self.metrics = importlib.import_module("snug.nodes.measure.image_metrics")
        self.samples: torch.Tensor | None = None

    def measure(self, name: str, patcher: Any) -> Row:
        samples = draw(patcher, self.classes.tolist(), SEED)
        if self.samples is None:
            self.samples = samples
        pictures, exact = decode(samples), decode(self.samples)
        psnr = self.metrics.psnr(pictures.flatten(0, 1)[None], exact.flatten(0, 1)[None]).item()
        return Row(
            name,
            patcher.model_size(),
            self.judge.accuracy(pictures, self.classes),
            None if samples.equal(self.samples) else psnr,
            self.metrics.ssim(pictures, exact).mean().item(),
            ((samples - self.samples).norm() / self.samples.norm()).item(),
        )


def measure_all(each: int, only: str) -> list[Row]:
    quantizing = importlib.import_module("snug.nodes.adapter.quantizing")
    dense = importlib.import_module("comfy.sd").load_diffusion_model(str(WEIGHTS))
    fidelity = Fidelity(each)
    rows = [fidelity.measure(DENSE, dense)]
    for target in [*quantizing.available_targets(), *quantizing.memory_targets()]:
        if only not in target:
            continue
        try:
            patcher, _ = quantizing.quantize_model(dense, quantizing.QuantizeSettings(target))
        except quantizing.SnugError as error:
            print(f"{target}: left out: {error}", file=sys.stderr)
            continue
        rows.append(fidelity.measure(target, patcher))
        print(f"{target}: {rows[-1]}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--comfyui", default=os.environ.get("SNUG_COMFYUI_PATH"), help="folder of ComfyUI")
    parser.add_argument("--each", type=int, default=20, help="digits of every class")
    parser.add_argument("--only", default="", help="only targets whose names contain this")
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(comfyui=None)
    if not options.comfyui:
        parser.error("--comfyui or SNUG_COMFYUI_PATH is needed")
    use_comfyui(options.comfyui)
    register_snug()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = measure_all(options.each, options.only)
    facts = environment("scikit-learn", "bitsandbytes", "torchao", "optimum-quanto")
    facts["pictures"] = f"{CLASSES * options.each} digits, {STEPS} steps, guidance {GUIDANCE:g}, seed {SEED}"
    text = f"{heading('Fidelity', command, facts)}\n{rows_table(rows)}\n\n{_explanation()}\n"
    print(text)
    save(options, text, {"command": command, "environment": facts, "rows": [asdict(row) for row in rows]})


def rows_table(rows: list[Row]) -> str:
    header = ["format", "MB", "recognised", "PSNR", "SSIM", "error of latents"]
    return table(
        header,
        [
            [
                row.target,
                f"{row.nbytes / 2**20:.1f}",
                f"{100 * row.accuracy:.1f} %",
                "–" if row.target == DENSE else "identical" if row.psnr is None else f"{row.psnr:.1f} dB",
                "–" if row.target == DENSE else f"{row.ssim:.4f}",
                "–" if row.target == DENSE else f"{100 * row.error:.2f} %",
            ]
            for row in rows
        ],
    )


def _explanation() -> str:
    return (
        "Pictures of 64x64 pixels by a model of 3.8 million weights: they tell how formats compare with one another, "
        "not how a large model fares."
    )


if __name__ == "__main__":
    main()
