"""The part of the demo that runs inside the prepared environment; ``./demo`` starts it."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from comfy_server import ComfyServer, ServerError, WorkflowError, execution_seconds
from console import Steps, say
from demo import parse
from demo_models import make_demo_model, write_gguf_versions
from demo_workflow import INFO_NODE, SAVE_NODE, Picture, workflow
from PIL import Image
from snug_path import ROOT

MB = 1e6


@dataclass(frozen=True)
class Result:
    """One row of the table. Sizes in bytes, ``seconds`` per sampling step, ``psnr`` in dB against the dense image."""

    name: str
    file_bytes: int
    weight_bytes: int
    seconds: float
    image: Path
    psnr: float | None


def main() -> int:
    options = parse()
    out: Path = options.out.resolve()
    base = out / "comfyui"
    models = base / "models"
    comfyui = Path(os.environ["SNUG_COMFYUI_PATH"])
    steps = Steps(3)

    with steps.step("model files"):
        if options.model:
            dense, vae, encoder = options.model, options.vae.name, options.text_encoder
            _place(options.vae, models / "vae")
            _place(encoder, models / "text_encoders")
        else:
            dense, encoder = out / "tiny-sd15.safetensors", None
            vae = make_demo_model(comfyui, dense, models / "vae_approx", options.seed)
        out.mkdir(parents=True, exist_ok=True)
        ggufs = write_gguf_versions(dense, out)
        for file in (dense, *ggufs.values()):
            _place(file, models / "diffusion_models")

    picture = Picture(
        size=options.size,
        steps=options.steps,
        seed=options.seed,
        vae=vae,
        prompt=options.prompt,
        text_encoder=encoder.name if encoder else None,
        text_encoder_type=options.text_encoder_type,
    )
    packs = {
        "ComfyUI-Snug": ROOT,
        "snug_test_nodes": ROOT / "tests" / "comfy" / "custom_nodes" / "snug_test_nodes",
    }
    server = ComfyServer(Path(sys.executable), comfyui, base, packs, cpu=not options.gpu)
    try:
        with steps.step("start ComfyUI"):
            server.start()
        if server.failed_imports():
            raise ServerError(f"ComfyUI could not import {server.failed_imports()}.\n{server.log_tail()}")
        with steps.step("images"):
            results = compare(server, picture, dense, ggufs, out)
        print_table(results, random_weights=encoder is None)
        print(f"\nImages and model files: {out}")
        if options.serve:
            print(f"ComfyUI with these models: {server.url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except (ServerError, WorkflowError) as error:
        say(f"error: {error}")
        return 1
    finally:
        server.stop()
    return 0


def compare(
    server: ComfyServer, picture: Picture, dense: Path, ggufs: dict[str, Path], out: Path
) -> list[Result]:
    """Draw the picture with every file, the dense one first: the others are measured against its image."""
    reference = draw(server, picture, f"dense {dense.suffix[1:]}", dense, out, None)
    rows = [draw(server, picture, f"GGUF {name}", file, out, reference.image) for name, file in ggufs.items()]
    return [reference, *rows]


def draw(
    server: ComfyServer, picture: Picture, name: str, file: Path, out: Path, reference: Path | None
) -> Result:
    server.free()
    dense = reference is None
    # The first run loads the model; the next two are alike but for their steps, so loading and decoding cancel.
    server.run(workflow(picture, file.name, dense, steps=2))
    short = server.wait(server.queue(workflow(picture, file.name, dense, steps=1)))
    full = server.wait(server.queue(workflow(picture, file.name, dense)))
    seconds = (execution_seconds(full) - execution_seconds(short)) / (picture.steps - 1)
    image = out / f"{name.replace(' ', '-')}.png"
    image.write_bytes(server.view(full["outputs"][SAVE_NODE]["images"][0]))
    psnr = None if reference is None else image_psnr(reference, image)
    return Result(name, file.stat().st_size, weight_memory(full["outputs"]), seconds, image, psnr)


def weight_memory(outputs: Mapping[str, Any]) -> int:
    """Bytes of the diffusion model's weights in memory after sampling, as its patcher counts them."""
    return json.loads(outputs[INFO_NODE]["model_info"][0])["loaded_size"]


def image_psnr(reference: Path, image: Path) -> float:
    """Peak signal-to-noise ratio of two 8-bit images in dB; infinite when they are equal."""
    a, b = (
        numpy.asarray(Image.open(path).convert("RGB"), dtype=numpy.float64) for path in (reference, image)
    )
    error = float(numpy.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def print_table(results: list[Result], random_weights: bool) -> None:
    print(f"\n{'':16}{'file':>12}{'weights':>12}{'s per step':>12}{'PSNR':>12}")
    for row in results:
        weights = f"{row.weight_bytes / MB:.1f} MB"
        psnr = "" if row.psnr is None else "identical" if math.isinf(row.psnr) else f"{row.psnr:.1f} dB"
        print(
            f"{row.name:16}{f'{row.file_bytes / MB:.1f} MB':>12}{weights:>12}{row.seconds:>12.3f}{psnr:>12}"
        )
    print(
        "\nweights: in memory while sampling, as ComfyUI counts them; PSNR: image against the dense model's, same seed."
    )
    if random_weights:
        print("The model has random weights, so its images are patterns; give a real one with --model.")


def _place(file: Path, folder: Path) -> None:
    """Make ``file`` visible in a model folder without copying it where links are possible."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / file.name
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(file.resolve())
    except OSError:
        os.link(file.resolve(), place)


if __name__ == "__main__":
    sys.exit(main())
