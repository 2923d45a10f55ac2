"""Write the workflows of example_workflows/, which ComfyUI offers under Workflow > Browse Templates.

    python scripts/make_workflows.py            # rewrites what is out of date
    python scripts/make_workflows.py --check    # only says what is, and fails

Needs an environment with ComfyUI: `eval "$(python3 scripts/bootstrap.py --print-env)"`, then
`$SNUG_PYTHON scripts/make_workflows.py --comfyui $SNUG_COMFYUI_PATH`. The pictures beside them are made from what
`./test tests/web/test_example_workflows.py` shows:

    python scripts/make_workflows.py --pictures test-output/page/VERSION/workflows
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from comfy_server import ComfyServer
from PIL import Image
from snug_path import ROOT
from workflow_graph import Graph, Output

FOLDER = ROOT / "example_workflows"
HUGGING_FACE = "https://huggingface.co/"
PROMPT = "a red fox under the moon, watercolour"
NOTE = (420, 340)
PICTURE_WIDTH = 800

# Where well-known files are: name, the folder in models/ they belong into, their page.
FILES = {
    "flux1-dev-Q4_K_S.gguf": ("diffusion_models", "city96/FLUX.1-dev-gguf"),
    "flux1-dev-Q8_0.gguf": ("diffusion_models", "city96/FLUX.1-dev-gguf"),
    "flux1-dev.safetensors": ("diffusion_models", "black-forest-labs/FLUX.1-dev"),
    "flux_dev_fp8_scaled_diffusion_model.safetensors": (
        "diffusion_models",
        "comfyanonymous/flux_dev_scaled_fp8_test",
    ),
    "flux1-dev-bnb-nf4-v2.safetensors": ("checkpoints", "lllyasviel/flux1-dev-bnb-nf4"),
    "t5-v1_1-xxl-encoder-Q8_0.gguf": ("text_encoders", "city96/t5-v1_1-xxl-encoder-gguf"),
    "t5-v1_1-xxl-encoder-Q5_K_M.gguf": ("text_encoders", "city96/t5-v1_1-xxl-encoder-gguf"),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": ("text_encoders", "comfyanonymous/flux_text_encoders"),
    "clip_l.safetensors": ("text_encoders", "comfyanonymous/flux_text_encoders"),
    "ae.safetensors": ("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged/tree/main/split_files/vae"),
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": ("loras", "ByteDance/Hyper-SD"),
}
Q4, Q8, BF16 = "flux1-dev-Q4_K_S.gguf", "flux1-dev-Q8_0.gguf", "flux1-dev.safetensors"
FP8 = "flux_dev_fp8_scaled_diffusion_model.safetensors"
NF4 = "flux1-dev-bnb-nf4-v2.safetensors"
T5_Q8, T5_Q5 = "t5-v1_1-xxl-encoder-Q8_0.gguf", "t5-v1_1-xxl-encoder-Q5_K_M.gguf"
T5_FP8 = "t5xxl_fp8_e4m3fn_scaled.safetensors"
CLIP_L, VAE, LORA = "clip_l.safetensors", "ae.safetensors", "Hyper-FLUX.1-dev-8steps-lora.safetensors"


class FluxPicture:
    """The workflow that all of them are variations of: Flux from a prompt to a picture.

    Columns: 0 loaders and the note, 1 what is done to the model, 2 prompt and size, 3 sampling, 4 pictures, 5 texts.
    """

    def __init__(self, object_info: Mapping[str, Any]) -> None:
        self.graph = Graph(object_info)
        self.files: list[str] = []

    def model(self, file: str, **settings: Any) -> Output:
        self.files.append(file)
        return self.graph.add("SnugLoadDiffusionModel", 0, model_name=file, **settings)

    def text_encoders(self, t5: str = T5_Q8, **settings: Any) -> Output:
        self.files += [t5, CLIP_L]
        return self.graph.add(
            "SnugLoadTextEncoders", 0, text_encoder_1=t5, type="flux", text_encoder_2=CLIP_L, **settings
        )

    def vae(self) -> Output:
        self.files.append(VAE)
        return self.graph.add("VAELoader", 0, vae_name=VAE)

    def conditioning(self, clip: Output) -> tuple[Output, Output, Output]:
        """Positive, negative and empty latent."""
        latent = self.graph.add("EmptySD3LatentImage", 2, width=1024, height=1024)
        text = self.graph.add("CLIPTextEncode", 2, title="Prompt", size=(380, 160), clip=clip, text=PROMPT)
        positive = self.graph.add("FluxGuidance", 2, conditioning=text, guidance=3.5)
        negative = self.graph.add("ConditioningZeroOut", 2, title="No negative prompt", conditioning=text)
        return positive, negative, latent

    def sample(self, model: Output, clip: Output, steps: int = 20) -> Output:
        return self.sampler(model, *self.conditioning(clip), steps=steps)

    def sampler(
        self, model: Output, positive: Output, negative: Output, latent: Output, steps: int = 20
    ) -> Output:
        return self.graph.add(
            "KSampler",
            3,
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=1,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
        )

    def decode(self, samples: Output, vae: Output) -> Output:
        return self.graph.add("VAEDecode", 3, samples=samples, vae=vae)

    def save(self, images: Output) -> None:
        self.graph.add("SaveImage", 4, size=(400, 440), images=images, filename_prefix="snug")

    def report(self, source: Output, title: str = "Report", size: tuple[int, int] = (560, 300)) -> None:
        self.graph.add("PreviewAny", 5, title=title, size=size, source=source)

    def done(self, note: str, size: tuple[int, int] = NOTE) -> dict[str, Any]:
        """The workflow, with the note and where its files are."""
        files = [
            f"- `models/{FILES[name][0]}`: [{name}]({HUGGING_FACE}{FILES[name][1]})" for name in self.files
        ]
        closing = "Files of any other model and format do as well: choose yours in the loaders."
        self.graph.note("\n".join([note.strip(), "", "**Files**", "", *files, "", closing]), 0, size)
        return self.graph.workflow()


def second(output: Output, slot: int = 1) -> Output:
    return Output(output.node, slot)


def gguf(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(Q4), flux.text_encoders(), flux.vae()
    flux.save(flux.decode(flux.sample(model, clip), vae))
    return flux.done(
        "## A model from a GGUF file\n\n"
        "Flux takes 6.8 GB of memory here instead of 23.8. **Load Diffusion Model** gives an ordinary MODEL: LoRA, "
        "ControlNet and every sampler work as they do with the large file.\n\n"
        "More memory? `Q6_K` and `Q8_0` are closer to the original. Less? `Q3_K_S`."
    )


def nf4(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    flux.files.append(NF4)
    checkpoint = flux.graph.add("SnugLoadCheckpoint", 0, checkpoint_name=NF4)
    clip, vae = second(checkpoint), second(checkpoint, 2)
    flux.save(flux.decode(flux.sample(checkpoint, clip), vae))
    return flux.done(
        "## Everything from one NF4 checkpoint\n\n"
        "**Load Checkpoint** reads model, text encoders and VAE from one file. Weights in NF4 (4 bits, bitsandbytes) "
        "stay packed in memory; no library but ComfyUI's own is needed, on any device.\n\n"
        "A model alone in NF4: use *Load Diffusion Model (Snug)*."
    )


def fp8(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(FP8), flux.text_encoders(T5_FP8), flux.vae()
    flux.save(flux.decode(flux.sample(model, clip), vae))
    return flux.done(
        "## A model in scaled FP8\n\n"
        "8 bits for each weight and a scale for each layer: half of the memory of bf16 on any device, and "
        "nearly the same picture. The T5 text encoder is in FP8 as well.\n\n"
        "FP8 that has scales by row or by blocks loads the same way."
    )


def mixed_encoders(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(FP8), flux.text_encoders(T5_Q5), flux.vae()
    flux.save(flux.decode(flux.sample(model, clip), vae))
    return flux.done(
        "## Text encoders in any mix of formats\n\n"
        "**Load Text Encoders** takes one to four files, each in a format of its own: here T5 from a GGUF file with 5 "
        "bits (3.4 GB instead of 9.5) and CLIP-L unquantized, beside a model in FP8. Their order does not matter.\n\n"
        "`quantize` stores a plain file in fewer bits while it loads."
    )


def quantize_and_save(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(BF16), flux.text_encoders(), flux.vae()
    quantized = flux.graph.add("SnugQuantizeModel", 1, model=model, target="GGUF Q4_K_M")
    saved = flux.graph.add(
        "SnugSaveModel", 1, model=quantized, filename_prefix="diffusion_models/flux1-dev-Q4_K_M"
    )
    flux.save(flux.decode(flux.sample(quantized, clip), vae))
    flux.report(second(quantized), "What became of the layers")
    flux.report(saved, "Where the file is", (560, 120))
    return flux.done(
        "## Quantize a model and save it\n\n"
        "**Quantize Model** stores the weights in fewer bits (any `target`), **Save Model** writes them into a file "
        "below `output/diffusion_models`, where the loaders find it. The picture shows what the file will give.\n\n"
        "A model that does not fit into memory: choose `quantize` in the loader instead, which works tensor by tensor, "
        "or use the command line."
    )


def layerwise_casting(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(BF16), flux.text_encoders(), flux.vae()
    cast = flux.graph.add("SnugLayerwiseCasting", 1, model=model)
    flux.save(flux.decode(flux.sample(cast, clip), vae))
    flux.report(second(cast), "What was cast")
    return flux.done(
        "## Half the memory, at once\n\n"
        "**Layerwise Casting** keeps the weights of any MODEL as float8 and calculates in its own precision, on any "
        "device. Norms, embedders and the last layer keep theirs. It takes a second, where quantizing to GGUF takes "
        "minutes, and the original model is not changed: bypass the node to compare."
    )


def group_offload(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(Q8), flux.text_encoders(), flux.vae()
    offloaded = flux.graph.add("SnugGroupOffload", 1, model=model, limit_gb=5.5)
    flux.save(flux.decode(flux.sample(offloaded, clip), vae))
    flux.report(second(offloaded), "What stays on the GPU")
    return flux.done(
        "## A 12.7 GB model on a card of 8 GB\n\n"
        "**Group Offload** keeps as many blocks on the GPU as fit into `limit_gb` and streams the others, each while "
        "those before it compute. 5.5 GB for the weights leave room for 1024 × 1024 pixels on a card of 8 GB.\n\n"
        "*Memory Budget (Snug)* finds the number by itself, for text encoders and VAE as well."
    )


def compile_model(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(Q4), flux.text_encoders(), flux.vae()
    compiled = flux.graph.add("SnugTorchCompile", 1, model=model)
    flux.save(flux.decode(flux.sample(compiled, clip), vae))
    return flux.done(
        "## Faster steps with torch.compile\n\n"
        "The first step takes longer, while **Compile Model** compiles the blocks that the model repeats; the others "
        "are faster. Another prompt, seed, size or LoRA compiles nothing.\n\n"
        "It needs Triton on a GPU (`pip install triton`, on Windows `triton-windows`), a C++ compiler on a CPU."
    )


def lora(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(Q4), flux.text_encoders(), flux.vae()
    flux.files.append(LORA)
    added = flux.graph.add("SnugLoadLora", 1, model=model, lora_name=LORA, strength_model=0.125)
    flux.save(flux.decode(flux.sample(added, clip, steps=8), vae))
    return flux.done(
        "## LoRA on a quantized model\n\n"
        "The LoRA stays at full precision beside the 4-bit weights: nothing is rounded, and it can be changed or taken "
        "away without loading the model again. This one makes good pictures in 8 steps.\n\n"
        "ComfyUI's own LoRA nodes work as well; **Load LoRA (Snug)** also reads GGUF, and says when one does not fit."
    )


def vram_monitor(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    model, clip, vae = flux.model(Q4), flux.text_encoders(), flux.vae()
    images = flux.decode(flux.sample(model, clip), vae)
    monitor = flux.graph.add("SnugVRAMMonitor", 4, size=(330, 330), value=images)
    flux.save(monitor)
    flux.report(second(monitor))
    flux.graph.add("PreviewImage", 5, title="Timeline", size=(560, 360), images=second(monitor, 2))
    return flux.done(
        "## See where the memory goes\n\n"
        "**VRAM Monitor** sits on a wire (here the picture's) and passes it on. After a run it knows, for every node "
        "before it, the peak, the growth and the time; *report* is the text, *timeline* the picture.\n\n"
        "While it runs, the bar in the node and the **Memory** tab in the sidebar show the same live."
    )


def compare(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    models, clip, vae = [flux.model(Q8), flux.model(Q4)], flux.text_encoders(), flux.vae()
    positive, negative, latent = flux.conditioning(clip)
    pictures = [flux.decode(flux.sampler(model, positive, negative, latent), vae) for model in models]
    compared = flux.graph.add(
        "SnugCompareImages",
        4,
        size=(640, 640),
        image_1=pictures[0],
        image_2=pictures[1],
        captions="Q8_0\nQ4_K_S",
    )
    flux.graph.add(
        "SaveImage", 5, title="Contact sheet", size=(560, 400), images=compared, filename_prefix="snug"
    )
    flux.report(second(compared))
    return flux.done(
        "## What do fewer bits cost?\n\n"
        "The same prompt and seed with two files of one model. **Compare Images** shows them under a slider, in a "
        "grid, blinking or as a map of their differences, with PSNR and SSIM; zoomed with the wheel, together.\n\n"
        "Up to eight pictures or batches can be connected; `captions` names them, one a line."
    )


def benchmark(info: Mapping[str, Any]) -> dict[str, Any]:
    flux = FluxPicture(info)
    models = [flux.model(Q8), flux.model(Q4)]
    clip, vae = flux.text_encoders(), flux.vae()
    positive, negative, latent = flux.conditioning(clip)
    measured = flux.graph.add(
        "SnugBenchmark",
        3,
        model=models[0],
        model_2=models[1],
        positive=positive,
        negative=negative,
        latent_image=latent,
        vae=vae,
        seed=1,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        captions="Q8_0\nQ4_K_S",
    )
    flux.report(measured)
    flux.graph.add("PreviewImage", 5, title="Plot", size=(560, 400), images=second(measured))
    return flux.done(
        "## Which model is faster here?\n\n"
        "**Benchmark** samples several times with each model and compares loading, steps, memory, and how far "
        "the result is from that of the first. Connect up to eight models, with other nodes before them if you like: "
        "*Compile Model*, *Group Offload*, LoRA.\n\n"
        "Close other programs that use the GPU while it runs."
    )


WORKFLOWS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "snug_gguf": gguf,
    "snug_nf4_checkpoint": nf4,
    "snug_fp8": fp8,
    "snug_mixed_text_encoders": mixed_encoders,
    "snug_quantize_and_save": quantize_and_save,
    "snug_layerwise_casting": layerwise_casting,
    "snug_group_offload_8gb": group_offload,
    "snug_compile": compile_model,
    "snug_lora": lora,
    "snug_vram_monitor": vram_monitor,
    "snug_compare": compare,
    "snug_benchmark": benchmark,
}


def written(name: str, object_info: Mapping[str, Any]) -> str:
    """The text of the file example_workflows/<name>.json."""
    return json.dumps(WORKFLOWS[name](object_info), ensure_ascii=False, indent=1) + "\n"


def outdated(object_info: Mapping[str, Any]) -> Iterator[Path]:
    for name in WORKFLOWS:
        path = FOLDER / f"{name}.json"
        if not path.exists() or path.read_text(encoding="utf-8") != written(name, object_info):
            yield path


def write_pictures(screenshots: Path) -> None:
    for name in WORKFLOWS:
        with Image.open(screenshots / f"{name}.png") as picture:
            size = (PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width))
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            small.save(FOLDER / f"{name}.jpg", quality=82, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--comfyui", default=os.environ.get("SNUG_COMFYUI_PATH"), metavar="PATH")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="of screenshots; nothing else is done"
    )
    options = parser.parse_args()
    if options.pictures:
        write_pictures(options.pictures)
        return
    if not options.comfyui:
        parser.error("ComfyUI is needed: give --comfyui PATH or set SNUG_COMFYUI_PATH")
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(
            Path(sys.executable), Path(options.comfyui), Path(base), {"ComfyUI-Snug": ROOT}
        ) as server,
    ):
        info = server.object_info()
    found = list(outdated(info))
    for path in found:
        print(f"{path.relative_to(ROOT)} is out of date" + ("" if options.check else ": rewritten"))
        if not options.check:
            path.write_text(written(path.stem, info), encoding="utf-8")
    if options.check and found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
