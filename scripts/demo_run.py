"""The part of the demo that runs inside the prepared environment; ``./demo`` starts it."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_server import ComfyServer, ServerError, WorkflowError, execution_seconds
from console import Steps, say
from demo import parse
from demo_models import make_demo_model, write_gguf_versions
from demo_sheet import digits_read, psnr, write_sheet
from demo_workflow import INFO_NODE, SAVE_NODE, Picture, workflow
from digits import PICTURE, TEXT_ENCODER_TYPE
from PIL import Image
from snug_path import ROOT

MB = 1e6


@dataclass(frozen=True)
class Result:
    """One row of the table. Sizes in bytes, ``seconds`` per sampling step, ``psnr`` in dB against the dense images,
    ``read``: how many of the digits asked for a classifier reads."""

    name: str
    file_bytes: int
    weight_bytes: int
    seconds: float
    images: Sequence[Image.Image]
    psnr: float | None
    read: int | None


def main() -> int:
    options = parse()
    out: Path = options.out.resolve()
    base = out / "comfyui"
    models = base / "models"
    comfyui = Path(os.environ["SNUG_COMFYUI_PATH"])
    steps = Steps(3)

    with steps.step("model files"):
        if options.model:
            dense, vae, encoder = options.model, options.vae.name, options.text_encoder.name
            _place(options.vae, models / "vae")
            _place(options.text_encoder, models / "text_encoders")
        else:
            dense, vae, encoder = (
                out / "digits.safetensors",
                "digits-vae.safetensors",
                "digits-t5.safetensors",
            )
            make_demo_model(comfyui, dense, models / "vae" / vae, models / "text_encoders" / encoder)
        out.mkdir(parents=True, exist_ok=True)
        ggufs = write_gguf_versions(dense, out)
        for file in (dense, *ggufs.values()):
            _place(file, models / "diffusion_models")

    picture = Picture(
        size=options.size if options.model else PICTURE,
        steps=options.steps,
        seed=options.seed,
        vae=vae,
        prompt=options.prompt if options.model else options.digits,
        text_encoder=encoder,
        text_encoder_type=options.text_encoder_type if options.model else TEXT_ENCODER_TYPE,
        is_digits=not options.model,
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
            results = compare(server, picture, dense, ggufs)
        sheet = out / "contact-sheet.png"
        write_sheet(sheet, [(row.name, summary(row), row.images) for row in results])
        print_table(results)
        print(f"\nImages side by side: {sheet}\nModel files: {out}")
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


def compare(server: ComfyServer, picture: Picture, dense: Path, ggufs: dict[str, Path]) -> list[Result]:
    """Draw the picture with every file, the dense one first: the others are measured against its images."""
    reference = draw(server, picture, None, dense, None)
    rows = [draw(server, picture, name, file, reference.images) for name, file in ggufs.items()]
    return [reference, *rows]


def draw(
    server: ComfyServer,
    picture: Picture,
    format: str | None,
    file: Path,
    reference: Sequence[Image.Image] | None,
) -> Result:
    server.free()
    name = f"GGUF {format}" if format else f"dense {file.suffix[1:]}"
    # The first run loads the model; the next two are alike but for their steps, so that what else they do cancels.
    server.run(workflow(picture, file.name, format, steps=2, decode=False))
    short = server.wait(server.queue(workflow(picture, file.name, format, steps=1, decode=False)))
    full = server.wait(server.queue(workflow(picture, file.name, format, decode=False)))
    seconds = (execution_seconds(full) - execution_seconds(short)) / (picture.steps - 1)
    outputs = server.run(workflow(picture, file.name, format))  # the latent is there already
    saved = outputs[SAVE_NODE]["images"]
    images = [Image.open(io.BytesIO(server.view(image))).convert("RGB") for image in saved]
    read = digits_read(images, picture.prompt) if picture.is_digits else None
    ratio = None if reference is None else psnr(reference, images)
    return Result(name, file.stat().st_size, weight_memory(outputs), seconds, images, ratio, read)


def weight_memory(outputs: Mapping[str, Any]) -> int:
    """Bytes of the diffusion model's weights in memory after sampling, as its patcher counts them."""
    return json.loads(outputs[INFO_NODE]["model_info"][0])["loaded_size"]


def print_table(results: list[Result]) -> None:
    has_digits = results[0].read is not None
    print(
        f"\n{'':16}{'file':>12}{'weights':>12}{'s per step':>12}{'PSNR':>12}{'read' * has_digits:>12}".rstrip()
    )
    for row in results:
        weights = f"{row.weight_bytes / MB:.1f} MB"
        read = f"{row.read} of {len(row.images)}" if has_digits else ""
        print(
            f"{row.name:16}{f'{row.file_bytes / MB:.1f} MB':>12}{weights:>12}{row.seconds:>12.3f}"
            f"{psnr_text(row):>12}{read:>12}".rstrip()
        )
    print(
        "\nweights: in memory while sampling, as ComfyUI counts them; PSNR: images against the dense model's, same seed"
        + ("; read: digits that a classifier of handwritten ones recognises." if has_digits else ".")
    )


def summary(row: Result) -> str:
    """Of a row of the sheet."""
    return "   ".join(filter(None, [f"{row.file_bytes / MB:.1f} MB", psnr_text(row)]))


def psnr_text(row: Result) -> str:
    return "" if row.psnr is None else "identical" if math.isinf(row.psnr) else f"{row.psnr:.1f} dB"


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
