"""Damaged folders by the hundred: config.json, index and shards each take their turn."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGES, Damage, is_readable
from diffusers_folders import save_folder
from diffusers_models import tiny_diffusers_model
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers.diffusers_folder import open_diffusers_folder
from snug.quant_backends.readers.diffusers_layout import is_diffusers_folder, list_diffusers_folders

CONFIG, INDEX = "config.json", "diffusion_pytorch_model.safetensors.index.json"
# Of each kind of damage to each file.
SAMPLE = 40


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD3 in NF4 with nested scales, in shards."""
    folder = tmp_path_factory.mktemp("valid") / "model"
    changes = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "caption_projection_dim": 64,
        "pos_embed_max_size": 8,
    }
    save_folder(tiny_diffusers_model("sd3", narrow=True, **changes), folder, "nf4-nested", shard_bytes=50_000)
    return folder


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*-of-*"))


def with_file(valid: Path, folder: Path, name: str, content: bytes) -> Path:
    """The folder with one file replaced; the others are links, for nothing changes them."""
    folder.mkdir()
    for path in valid.iterdir():
        if path.name != name:
            os.link(path, folder / path.name)
    (folder / name).write_bytes(content)
    return folder


def use(folder: Path) -> None:
    is_diffusers_folder(folder)
    list_diffusers_folders(folder.parent)
    for value in open_diffusers_folder(folder).state_dict.values():
        if isinstance(value, PackedTensor):
            dequantize_packed(value)
        else:
            value.clone()


def check(folders: Iterator[Path], label: str) -> dict[bool, int]:
    outcomes = {True: 0, False: 0}
    for index, folder in enumerate(folders):
        outcomes[is_readable(folder, use, f"{label} {index}")] += 1
        shutil.rmtree(folder)
    return outcomes


def test_the_undamaged_folder_is_valid(valid: Path) -> None:
    use(valid)
    assert len(shards(valid)) > 2


@pytest.mark.parametrize("target", ["config", "index", "shard"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: Damage, target: str, valid: Path, tmp_path: Path) -> None:
    name = {"config": CONFIG, "index": INDEX, "shard": shards(valid)[0]}[target]
    content = (valid / name).read_bytes()
    header = 8 + struct.unpack_from("<Q", content)[0] if target == "shard" else len(content)
    produced = list(damage(random.Random(f"{damage.__name__} {target}"), content[: header + 64], header))
    step = max(1, len(produced) // SAMPLE)
    chosen = (mutant + content[header + 64 :] for mutant in itertools.islice(produced, 0, None, step))
    folders = (with_file(valid, tmp_path / f"{n}", name, mutant) for n, mutant in enumerate(chosen))
    outcomes = check(folders, f"{damage.__name__} {target}")
    assert sum(outcomes.values()) >= SAMPLE and outcomes[False]


WRONG: list[Any] = [
    None,
    True,
    -1,
    1 << 80,
    1e308,
    "",
    "x",
    "\0",
    "\ud800",
    [],
    [[]],
    {},
    {"a": {}},
    "../x",
    "/etc",
]


def test_wrong_values_in_the_config(valid: Path, tmp_path: Path) -> None:
    config = json.loads((valid / CONFIG).read_text())
    changed = [config | {key: value} for key in ("_class_name", "quantization_config") for value in WRONG]
    for key, value in itertools.product(config["quantization_config"], WRONG):
        changed.append(config | {"quantization_config": config["quantization_config"] | {key: value}})
    contents = [json.dumps(found).encode() for found in changed]
    folders = (with_file(valid, tmp_path / f"{n}", CONFIG, found) for n, found in enumerate(contents))
    outcomes = check(folders, "config")
    assert outcomes[True] and outcomes[False]


def test_wrong_shards_in_the_index(valid: Path, tmp_path: Path) -> None:
    index = json.loads((valid / INDEX).read_text())
    first, *_, last = index["weight_map"]
    tricks = [
        "../model/x",
        "a/../b",
        "..",
        ".",
        "\\\\host\\x",
        "C:x",
        "x:y",
        "~x",
        "%2e%2e",
        "CON",
        "x" * 300,
        " x",
        "x\n",
    ]
    files = [*tricks, *(f"{trick}.safetensors" for trick in tricks), "a/../" + shards(valid)[0]]
    values = [*WRONG, *files, *shards(valid)[1:]]
    changed = [index | {"weight_map": index["weight_map"] | {first: value}} for value in values]
    changed += [index | {"weight_map": dict.fromkeys(index["weight_map"], value)} for value in values]
    changed += [index | {"weight_map": value} for value in WRONG]
    changed.append({"weight_map": {first: index["weight_map"][last]}})
    contents = [json.dumps(found).encode() for found in changed]
    folders = (with_file(valid, tmp_path / f"{n}", INDEX, found) for n, found in enumerate(contents))
    assert check(folders, "index")[True] == 0


def test_missing_extra_and_exchanged_shards(valid: Path, tmp_path: Path) -> None:
    names = shards(valid)

    def folders() -> Iterator[Path]:
        for number, (one, other) in enumerate(itertools.product(names, names)):
            folder = with_file(valid, tmp_path / f"{number}", one, (valid / other).read_bytes())
            if one == other:
                (folder / one).unlink()
            yield folder
        for number, other in enumerate([CONFIG, INDEX]):
            yield with_file(valid, tmp_path / f"json {number}", names[0], (valid / other).read_bytes())
        directory = with_file(valid, tmp_path / "directory", names[0], b"")
        (directory / names[0]).unlink()
        (directory / names[0]).mkdir()
        yield directory

    assert check(folders(), "shards")[True] == 0
    extra = with_file(valid, tmp_path / "extra", "diffusion_pytorch_model-00009-of-00009.safetensors", b"x")
    assert is_readable(extra, use, "a file that the index does not name")
