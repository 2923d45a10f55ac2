"""Folders written by diffusers give the model's weights under reference names; what is no model is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import FOLDER_KINDS, save_folder
from diffusers_models import NARROW, tiny_diffusers_model
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers.conventions import LoadedSafetensors
from snug.quant_backends.readers.diffusers_folder import open_diffusers_folder
from snug.quant_backends.readers.diffusers_layout import is_diffusers_folder, list_diffusers_folders
from snug.quant_backends.readers.diffusers_names import to_original_names

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def packed_names(loaded: LoadedSafetensors) -> set[str]:
    return {name for name, value in loaded.state_dict.items() if isinstance(value, PackedTensor)}


def check(loaded: LoadedSafetensors, expected: dict[str, torch.Tensor]) -> None:
    wanted = to_original_names(expected)
    assert loaded.state_dict.keys() == wanted.keys()
    for name, value in loaded.state_dict.items():
        target: Any = wanted[name]
        dense = dequantize_packed(value, target.dtype) if isinstance(value, PackedTensor) else value
        assert torch.equal(dense.to(target.dtype), target), name


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("family", NARROW)
def test_dense_folders(family: str, shards: str, tmp_path: Path) -> None:
    model = tiny_diffusers_model(family, narrow=True)
    expected = save_folder(model, tmp_path, shard_bytes=600_000 if shards == "shards" else 1 << 40)
    assert (tmp_path / INDEX).exists() == (shards == "shards")
    calls: list[tuple[int, int]] = []
    loaded = open_diffusers_folder(tmp_path, lambda done, total: calls.append((done, total)))
    check(loaded, expected)
    assert loaded.convention.name == "plain" and loaded.format_counts == {"F32": len(expected)}
    total = sum(value.nbytes for value in expected.values())
    assert calls[-1] == (total, total) and len(calls) == len(expected)


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("kind", FOLDER_KINDS)
@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_quantized_folders(family: str, kind: str, shards: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if kind.startswith("torchao") else torch.float32
    model = tiny_diffusers_model(family, narrow=True).to(dtype)
    expected = save_folder(model, tmp_path / "model", kind, 40_000 if shards == "shards" else 1 << 40)
    if shards == "shards" and kind in ("nf4-nested", "torchao-int8", "quanto-int4"):
        weight_map = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
        layers = {(re.split(r"\._?weight|\.SCB", name)[0], file) for name, file in weight_map.items()}
        assert len(layers) > len({layer for layer, _ in layers}), "parts of a weight lie in two files"
    loaded = open_diffusers_folder(tmp_path / "model")
    check(loaded, expected)
    fused = {"flux": "double_blocks.0.img_attn.qkv.weight", "sd3": "joint_blocks.0.x_block.attn.qkv.weight"}
    name = fused.get(family, "blocks.0.self_attn.q.weight")
    assert name in packed_names(loaded), "joined without decoding"
    if family != "wan":
        assert "final_layer.adaLN_modulation.1.weight" in packed_names(loaded)


@pytest.mark.parametrize("kind", ["nf4-nested", "torchao-int8", "quanto-int4"])
@pytest.mark.parametrize("family", ["sdxl", "pixart", "qwen_image"])
def test_quantized_folders_of_other_families(family: str, kind: str, tmp_path: Path) -> None:
    """SDXL's attention has no biases, so that quanto's groups get their shapes from elsewhere."""
    dtype = torch.bfloat16 if kind.startswith("torchao") else torch.float32
    model = tiny_diffusers_model(family, narrow=True).to(dtype)
    expected = save_folder(model, tmp_path / "model", kind, 100_000)
    loaded = open_diffusers_folder(tmp_path / "model")
    check(loaded, expected)
    assert len(packed_names(loaded)) > 10


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "sd3"
    save_folder(tiny_diffusers_model("sd3", narrow=True), folder, shard_bytes=2_000_000)
    return folder


@pytest.fixture
def copied(sd3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3, tmp_path / "model"))


Edit = Callable[[Path], None]


def edit_json(file: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return edit


def edit_weight_map(change: Callable[[dict[str, Any]], None]) -> Edit:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def place(name: Any) -> Edit:
    return edit_weight_map(lambda weight_map: weight_map.update({"proj_out.weight": name}))


def rewrite(file: str, content: bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return edit


def only(*files: str) -> Edit:
    """Replace the weights by files of these names."""

    def edit(folder: Path) -> None:
        for path in folder.glob("diffusion_pytorch_model*"):
            path.unlink()
        for name in files:
            (folder / name).write_bytes(b"x")

    return edit


def remove(*patterns: str) -> Edit:
    def edit(folder: Path) -> None:
        for pattern in patterns:
            for path in list(folder.glob(pattern)):
                path.unlink()

    return edit


def another_copy_of(name: str) -> Edit:
    """A tensor in a second shard."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        index = json.loads((folder / INDEX).read_text())["weight_map"]
        other = next(shard for shard in sorted(set(index.values())) if shard != index[name])
        tensors = load_file(folder / other) | {name: torch.zeros(2)}
        save_file(tensors, folder / other)

    return edit


QUANTIZED = "quantization_config"
REFUSED: list[tuple[str, Edit, str]] = [
    (
        "no config",
        remove("config.json"),
        "holds no config.json, expected a model in diffusers' layout; choose",
    ),
    (
        "config too large",
        rewrite("config.json", b'{"a": "' + bytes(1 << 20) + b'"}'),
        "more than 1048576 bytes",
    ),
    ("config no JSON", rewrite("config.json", b"{"), "config.json: the file is not valid JSON"),
    ("config a list", rewrite("config.json", b"[]"), "config.json: the file is not a JSON object"),
    ("no class", rewrite("config.json", b"{}"), "does not name a model class"),
    (
        "text encoder",
        rewrite("config.json", b'{"architectures": ["T5EncoderModel"], "model_type": "t5"}'),
        r"a text encoder or another model of transformers \('t5'\).*Load Text Encoders",
    ),
    (
        "vae",
        edit_json("config.json", _class_name="AutoencoderKL"),
        r"is a VAE \('AutoencoderKL'\).* models/vae",
    ),
    ("controlnet", edit_json("config.json", _class_name="SD3ControlNetModel"), "is a ControlNet or adapter"),
    (
        "svdquant",
        edit_json("config.json", **{QUANTIZED: {"method": "svdquant"}}),
        "'svdquant', .* Nunchaku's own",
    ),
    (
        "gptq",
        edit_json("config.json", **{QUANTIZED: {"quant_method": "gptq"}}),
        "with 'gptq', .* load a GGUF",
    ),
    ("awq", edit_json("config.json", **{QUANTIZED: {"quant_method": "awq"}}), "quantized with 'awq'"),
    (
        "gguf",
        edit_json("config.json", **{QUANTIZED: {"quant_method": "gguf"}}),
        "GGUF models are single files",
    ),
    (
        "modelopt",
        edit_json("config.json", **{QUANTIZED: {"quant_method": "modelopt"}}),
        "Snug does not know it",
    ),
    ("method a number", edit_json("config.json", **{QUANTIZED: {"quant_method": 4}}), "has no quant_method"),
    ("quantization a list", edit_json("config.json", **{QUANTIZED: []}), "has no quant_method"),
    (
        "quantized only by the config",
        edit_json("config.json", **{QUANTIZED: {"quant_method": "torchao"}}),
        "says that it is quantized with torchao, but it has no such weights",
    ),
    ("index missing", remove("*.index.json"), "the index.json of the model's shards is missing"),
    ("index no JSON", rewrite(INDEX, b"]"), "index.json: the file is not valid JSON"),
    ("index empty", edit_json(INDEX, weight_map={}), "the index has no weight_map"),
    ("index without map", edit_json(INDEX, weight_map=None), "the index has no weight_map"),
    (
        "path upwards",
        place("../x.safetensors"),
        r"into '../x.safetensors', expected the name of a safetensors file",
    ),
    ("absolute path", place("/etc/x.safetensors"), "expected the name of a safetensors file"),
    ("subfolder", place("a/x.safetensors"), "expected the name of a safetensors file"),
    ("Windows path", place("..\\x.safetensors"), "expected the name of a safetensors file"),
    ("drive", place("C:x.safetensors"), "expected the name of a safetensors file"),
    ("hidden file", place(".x.safetensors"), "expected the name of a safetensors file"),
    ("another ending", place("config.json"), "expected the name of a safetensors file"),
    ("number", place(7), "expected the name of a safetensors file"),
    (
        "pickled shard",
        place("diffusion_pytorch_model.bin"),
        "names the PyTorch pickle .*convert it to safetensors",
    ),
    (
        "one shard missing",
        remove("*-00002-of-*"),
        r"1 of \d files are missing: \S+-00002-of-\d+.safetensors; download",
    ),
    ("all shards missing", remove("*-of-*"), r"files are missing: \S+-00001-of-\d+.safetensors, \S+-00002"),
    (
        "tensor nowhere",
        edit_weight_map(lambda found: found.update({"more.weight": found["proj_out.weight"]})),
        "the tensor 'more.weight' should lie in .*, which does not have it",
    ),
    (
        "tensor elsewhere",
        edit_weight_map(lambda found: found.update({"proj_out.weight": found["pos_embed.proj.weight"]})),
        "the tensor 'proj_out.weight' should lie in .*, which does not have it",
    ),
    ("tensor twice", another_copy_of("proj_out.weight"), "the tensor 'proj_out.weight' lies in both"),
    (
        "many shards",
        edit_json(INDEX, weight_map={f"{n}": f"{n}.safetensors" for n in range(1001)}),
        "1001 files",
    ),
    (
        "only pickles",
        only("diffusion_pytorch_model.bin"),
        "only as PyTorch pickles; convert them to safetensors",
    ),
    (
        "only GGUF",
        only("model-Q4_0.gguf"),
        "but 'model-Q4_0.gguf'; put that file into models/diffusion_models",
    ),
    ("other file", only("flux.safetensors"), "but 'flux.safetensors'; put that file"),
    ("no weights", only(), "the folder holds no weights; download"),
]


@pytest.mark.parametrize(
    ("edit", "sentence"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_refused(edit: Edit, sentence: str, copied: Path) -> None:
    edit(copied)
    with pytest.raises(FileFormatError, match=sentence) as caught:
        open_diffusers_folder(copied)
    assert str(caught.value).startswith(str(copied)) and str(caught.value).count("\n") == 0


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="the folder is missing"):
        open_diffusers_folder(tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match="the folder is empty, expected a model in diffusers' layout"):
        open_diffusers_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileFormatError, match="the pipeline has no folder transformer or unet"):
        open_diffusers_folder(tmp_path)


def test_an_incomplete_fused_layer_is_named(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: value for path in copied.glob("*-of-*") for name, value in load_file(path).items()}
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    remove("diffusion_pytorch_model*")(copied)
    save_file(tensors, copied / WEIGHTS)
    with pytest.raises(
        FileFormatError, match=r"incomplete: .*'joint_blocks.1.x_block.attn.qkv.weight' it has only"
    ):
        open_diffusers_folder(copied)


def test_shards_may_be_links_as_in_a_download_cache(copied: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(copied.iterdir())):
        path.rename(blobs / str(number))
        try:
            os.symlink(blobs / str(number), path)
        except OSError:
            pytest.skip("this system makes no links")
    check(open_diffusers_folder(copied), tiny_diffusers_model("sd3", narrow=True).state_dict())


def test_variants(tmp_path: Path) -> None:
    """The plain weights, where there are any; else a variant, in one file or in shards."""
    model = tiny_diffusers_model("sd3", narrow=True)
    halves = {name: value.half() for name, value in model.state_dict().items()}
    half = tiny_diffusers_model("sd3", narrow=True).half()
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    check(open_diffusers_folder(tmp_path), halves)
    model.save_pretrained(tmp_path)
    check(open_diffusers_folder(tmp_path), model.state_dict())
    half.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size=1_000_000)
    assert (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    check(open_diffusers_folder(tmp_path / "shards"), halves)


def test_pipelines_and_the_list_of_folders(sd3: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    for name in (
        "one/transformer",
        "deep/er/two/transformer",
        "two/transformer",
        "two/transformer_2",
        "alone",
        "vae",
    ):
        shutil.copytree(sd3, root / name)
    for name in ("one", "deep/er/two", "two", "none"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "model_index.json").write_text("{}")
    edit_json("config.json", _class_name="AutoencoderKL")(root / "vae")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    (root / "file.safetensors").write_bytes(b"")
    assert list_diffusers_folders(root) == [
        "alone",
        "deep/er/two",
        "one",
        "two/transformer",
        "two/transformer_2",
    ]
    assert list_diffusers_folders(tmp_path / "nowhere") == []
    assert is_diffusers_folder(root / "one") and not is_diffusers_folder(root)
    expected = tiny_diffusers_model("sd3", narrow=True).state_dict()
    check(open_diffusers_folder(root / "one"), expected)
    check(open_diffusers_folder(root / "two"), expected)


def test_quanto_groups_whose_rows_nothing_tells_are_refused(tmp_path: Path) -> None:
    model = tiny_diffusers_model("sdxl", narrow=True)
    save_folder(model, tmp_path / "model", "quanto-int4")
    edit_json("config.json", cross_attention_dim=100)(tmp_path / "model")
    with pytest.raises(
        FileFormatError, match=r"the shape of '.*attn2.to_[kv].weight' cannot be told: quanto"
    ):
        open_diffusers_folder(tmp_path / "model")
