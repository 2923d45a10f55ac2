"""Wrong files and combinations in the real server: each gives one sentence before memory is spent, and it goes on."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from lora_files import random_factors, write_adapter
from safetensors.torch import save_file
from twins import Twins
from workflows import Workflow

pytestmark = pytest.mark.comfy

MIB = 1 << 20
MAX_GROWTH = 64 * MIB
DTYPE_BYTES = {"F16": 2, "U8": 1, "I32": 4, "F32": 4}
LAYER = "transformer_blocks.0.attn.to_q"
CLIP_L = {
    "text_model.embeddings.token_embedding.weight": (49408, 768),
    **{
        f"text_model.encoder.layers.{layer}.{name}.weight": (rows, columns)
        for layer in range(12)
        for name, rows, columns in (
            ("self_attn.q_proj", 768, 768),
            ("mlp.fc1", 3072, 768),
            ("mlp.fc2", 768, 3072),
            ("layer_norm1", 1, 768),
        )
    },
}
T5 = {
    "shared.weight": (32128, 4096),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
}
VAE = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "decoder.conv_in.weight": (512, 16, 3, 3),
    "decoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
}
FLUX = {
    "img_in.weight": (3072, 64),
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "single_blocks.0.linear1.weight": (21504, 3072),
}
LORA = {
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (2048, 3072),
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (9216, 2048),
}


def sparse(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", cut: int = 0, **dtypes: str
) -> None:
    """A safetensors file of zeros at full size that takes no disk. dtypes: by the last part of a name; cut: bytes
    missing at the end."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        kind = dtypes.get(name.rpartition(".")[2], dtype)
        end = offset + math.prod(shape) * DTYPE_BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset - cut)


def write_gguf(path: Path, architecture: str, names: tuple[str, ...], **metadata: Any) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, int):
            writer.add_uint16(key.replace("_", "."), value)
        else:
            writer.add_string(key.replace("_", "."), value)
    for name in names:
        writer.add_tensor(name, np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def content(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def tensors(shapes: Mapping[str, tuple[int, ...]], **options: Any) -> Callable[[Path], None]:
    return lambda path: sparse(path, shapes, **options)


def gguf_of(architecture: str, *names: str, **metadata: Any) -> Callable[[Path], None]:
    return lambda path: write_gguf(path, architecture, names, **metadata)


def pickled(zipped: bool) -> Callable[[Path], None]:
    weights = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(64, 64)}
    return lambda path: torch.save(weights, path, _use_new_zipfile_serialization=zipped)


def quantized(*suffixes: str) -> Callable[[Path], None]:
    return tensors({f"{LAYER}.{suffix}": (4096, 8192) for suffix in suffixes}, dtype="I32")


def lora_gguf(path: Path) -> None:
    write_adapter(path, random_factors({"blk.0.attn_q": (64, 64)}), "llama")


def truncated_gguf(path: Path) -> None:
    write_gguf(path, "flux", ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mlp.0.weight"))
    path.write_bytes(path.read_bytes()[:-20000])


def unknown_type(path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv.weight"
    write_gguf(path, "flux", (name,))
    data = path.read_bytes()
    place = (
        data.index(name.encode()) + len(name) + 4 + 2 * 8
    )  # after the number of dimensions and the dimensions
    path.write_bytes(data[:place] + struct.pack("<I", 99) + data[place + 4 :])


def nf4_without_absmax(path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv.weight"
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    save_file(
        {
            name: torch.zeros(2048, 1, dtype=torch.uint8),
            f"{name}.quant_map": torch.zeros(16),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        },
        path,
    )


def folder_without_shard(path: Path) -> None:
    path.mkdir()
    index = {
        "metadata": {"total_size": 2 * 4096},
        "weight_map": {
            f"transformer_blocks.{n}.attn.to_q.weight": f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors"
            for n in (0, 1)
        },
    }
    (path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    sparse(
        path / "diffusion_pytorch_model-00001-of-00002.safetensors",
        {"transformer_blocks.0.attn.to_q.weight": (32, 64)},
    )


def gone(path: Path) -> None:
    path.symlink_to(path.with_name("no such file"))  # still listed, as a file is that was deleted since


HTML = b"<!DOCTYPE html><html><head><title>Log in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
LLAMA = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output_norm.weight")
MMPROJ = ("v.blk.0.attn_q.weight", "v.patch_embd.weight", "mm.0.weight")
ENCODER = "text encoder.*models/text_encoders.*Load Text Encoders"

# File name, what writes it, what the sentence says.
MODELS: list[tuple[str, Callable[[Path], None], str]] = [
    ("llama.gguf", gguf_of("llama", *LLAMA), ENCODER),
    ("t5.gguf", gguf_of("t5", "enc.blk.0.attn_q.weight", "token_embd.weight"), ENCODER),
    ("clip_l.safetensors", tensors(CLIP_L), ENCODER),
    ("t5xxl.safetensors", tensors(T5), ENCODER),
    ("vae.safetensors", tensors(VAE), "a VAE.*models/vae"),
    ("lora.safetensors", tensors(LORA), "a LoRA.*models/loras"),
    ("lora.gguf", lora_gguf, "a LoRA.*models/loras"),
    ("mmproj.gguf", gguf_of("clip", *MMPROJ, general_type="mmproj"), "mmproj.*text encoder"),
    ("pickle.safetensors", pickled(zipped=False), "pickle.*convert it to safetensors"),
    ("zip.safetensors", pickled(zipped=True), "pickle.*convert it to safetensors"),
    ("pickle.gguf", pickled(zipped=True), "zip or PyTorch file"),
    ("svdquant.safetensors", quantized("qweight", "wscales", "smooth"), "SVDQuant.*does not load.*GGUF"),
    ("gptq.safetensors", quantized("qweight", "qzeros", "g_idx", "scales"), "GPTQ.*does not load.*GGUF"),
    ("awq.safetensors", quantized("qweight", "qzeros", "scales"), "AWQ.*does not load.*GGUF"),
    ("cut.safetensors", tensors(FLUX, cut=100 * MIB), "file ends.*download"),
    ("cut.gguf", truncated_gguf, "file ends.*download"),
    ("empty.safetensors", content(b""), "empty.*download"),
    ("empty.gguf", content(b""), "empty.*download"),
    ("page.safetensors", content(HTML), "web page.*download the file itself"),
    ("page.gguf", content(HTML), "web page.*download the file itself"),
    ("pointer.safetensors", content(POINTER), "Git LFS pointer.*download the file itself"),
    (
        "flux-00001-of-00003.gguf",
        gguf_of("flux", "double_blocks.0.img_attn.qkv.weight", split_count=3),
        "one of 3 parts.*merge",
    ),
    ("header.safetensors", content(struct.pack("<Q", 1 << 40) + b"{" + b" " * 4096), "header.*at most"),
    ("no-shard", folder_without_shard, "00002-of-00002.*download"),
    ("nf4.safetensors", nf4_without_absmax, "absmax.*missing.*download"),
    ("type.gguf", unknown_type, "type 99|unknown.*99"),
    ("gone.safetensors", gone, "not found.*refresh"),
    ("gone.gguf", gone, "not found.*refresh"),
    ("nothing.safetensors", content(struct.pack("<Q", 2) + b"{}"), "no tensors.*choose"),
]
# Files by input of the text-encoder node, its type, what the sentence about the first says.
Files = dict[str, tuple[str, Callable[[Path], None]]]
ENCODERS: dict[str, tuple[Files, str, str]] = {
    "diffusion model": ({"1": ("flux.safetensors", tensors(FLUX))}, "flux", "diffusion model"),
    "diffusion model gguf": (
        {"1": ("flux.gguf", gguf_of("flux", "double_blocks.0.img_attn.qkv.weight"))},
        "flux",
        "diffusion model",
    ),
    "type": ({"1": ("clip.safetensors", tensors(CLIP_L))}, "wan", "this is CLIP-L.*choose type .*sd3"),
    "type of two": (
        {"1": ("t5.safetensors", tensors(T5)), "2": ("clip.safetensors", tensors(CLIP_L))},
        "sdxl",
        "this is T5.*choose type",
    ),
    "mmproj": (
        {"1": ("mmproj.gguf", gguf_of("clip", *MMPROJ, general_type="mmproj"))},
        "qwen_image",
        "mmproj.*choose the text encoder",
    ),
    "lora": ({"1": ("lora.safetensors", tensors(LORA))}, "flux", "a LoRA.*models/loras"),
    "vae": ({"1": ("vae.safetensors", tensors(VAE))}, "flux", "a VAE.*models/vae"),
    "page": ({"1": ("page.safetensors", content(HTML))}, "flux", "web page"),
    "gone": ({"1": ("gone.gguf", gone)}, "flux", "not found.*refresh"),
}


def memory(server: ComfyServer, what: str) -> int:
    """Bytes of the server's process: VmRSS, or VmHWM, its peak."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


@pytest.fixture
def error_of(comfy_server: ComfyServer) -> Callable[..., str]:
    """error_of(workflow, name): the node's one sentence about the file; the server's memory stayed as it was."""

    def run(workflow: Workflow, name: str) -> str:
        measured = sys.platform == "linux"
        if measured:
            Path(f"/proc/{comfy_server.pid}/clear_refs").write_text("5")
        before = memory(comfy_server, "VmRSS") if measured else 0
        with pytest.raises(WorkflowError) as caught:
            comfy_server.run(workflow)
        message = str(caught.value)
        assert caught.value.node_type == workflow["loader"]["class_type"], message
        assert re.search(r"(FileFormat|Snug)Error: ", message), message
        assert "\n" not in message and name in message and message.endswith("."), message
        if measured:
            assert memory(comfy_server, "VmHWM") - before < MAX_GROWTH
        return message

    return run


def loading(node: str, **inputs: str) -> Workflow:
    return {
        "loader": {"class_type": node, "inputs": inputs},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["loader", 0]}},
    }


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            inside.unlink()
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize(("name", "write", "expected"), MODELS, ids=[case[0] for case in MODELS])
def test_files_that_are_no_diffusion_model(
    name: str,
    write: Callable[[Path], None],
    expected: str,
    comfy_server: ComfyServer,
    error_of: Callable[..., str],
) -> None:
    path = comfy_server.base / "models" / "diffusion_models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    listed = f"{name}/" if path.is_dir() else name
    try:
        message = error_of(loading("SnugLoadDiffusionModel", model_name=listed, compute_dtype="auto"), name)
        assert re.search(expected, message), message
    finally:
        remove(path)


@pytest.mark.parametrize(("files", "clip_type", "expected"), ENCODERS.values(), ids=list(ENCODERS))
def test_files_that_are_not_the_text_encoder(
    files: Files, clip_type: str, expected: str, comfy_server: ComfyServer, error_of: Callable[..., str]
) -> None:
    folder = comfy_server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in files.values():
        write(folder / name)
    chosen = {f"text_encoder_{number}": name for number, (name, _) in files.items()}
    try:
        message = error_of(loading("SnugLoadTextEncoders", type=clip_type, **chosen), files["1"][0])
        assert re.search(expected, message), message
    finally:
        for name, _ in files.values():
            remove(folder / name)


def test_two_text_encoders_where_one_is_wanted(comfy_server: ComfyServer) -> None:
    folder = comfy_server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("one.safetensors", "two.safetensors")
    for name in names:
        sparse(folder / name, T5)
    with pytest.raises(
        WorkflowError, match=r"Type wan takes 1 text encoder file, got 2; set the others to none"
    ):
        comfy_server.run(
            loading("SnugLoadTextEncoders", type="wan", text_encoder_1=names[0], text_encoder_2=names[1])
        )
    for name in names:
        remove(folder / name)


def test_the_server_goes_on(comfy_server: ComfyServer, twins: Callable[[str, str], Twins]) -> None:
    good = twins("sd3", "Q8_0").gguf
    workflow = loading("SnugLoadDiffusionModel", model_name=good.name, compute_dtype="auto")
    bad = good.with_name("bad.gguf")
    bad.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(WorkflowError, match="download"):
        comfy_server.run(loading("SnugLoadDiffusionModel", model_name=bad.name, compute_dtype="auto"))
    bad.write_bytes(good.read_bytes())
    workflow["loader"]["inputs"]["model_name"] = bad.name  # the same name, now whole
    assert comfy_server.run(workflow)["show"]["text"]
    bad.unlink()
