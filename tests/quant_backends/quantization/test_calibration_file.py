"""Calibrations survive their file bit for bit, and no other file passes for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.quantization.calibration import (
    METADATA_KEY,
    Calibration,
    LayerStatistics,
    load_calibration,
    save_calibration,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    layers = {
        name: LayerStatistics(
            torch.rand(channels, generator=generator),
            torch.rand(channels, generator=generator),
            torch.tensor([-1.5, 2.25]),
            2**40 + channels,
            torch.randn(3, channels, generator=generator).bfloat16() if channels > 1 else None,
        )
        for name, channels in (("blocks.0.mlp.0", 7), ("head", 1))
    }
    path = tmp_path / "found.safetensors"
    save_calibration(Calibration(layers, {"model": "SD3", "samples": 2}), path)
    return path


def test_keys_and_values(saved: Path) -> None:
    found = load_calibration(saved)
    assert found.info == {"model": "SD3", "samples": 2}
    assert list(found.layers) == ["blocks.0.mlp.0", "head"]
    tensors = load_file(saved)
    parts = ("absmax", "mean_square", "range", "rows")
    keys = [f"{name}.{part}" for name in found.layers for part in parts]
    assert sorted(tensors) == sorted([*keys, "blocks.0.mlp.0.sample"])
    sample = found.layers["blocks.0.mlp.0"].sample
    assert sample is not None and torch.equal(sample, tensors["blocks.0.mlp.0.sample"])
    for name, layer in found.layers.items():
        assert torch.equal(layer.mean_square, tensors[f"{name}.mean_square"])
        assert torch.equal(layer.absmax, tensors[f"{name}.absmax"])
        assert torch.equal(layer.range, tensors[f"{name}.range"])
        assert layer.rows == tensors[f"{name}.rows"].item() > 2**40
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fill_the_disk(path: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    found = load_calibration(saved)
    monkeypatch.setattr("os.replace", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_calibration(found, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def damaged(key: str, value: torch.Tensor | None) -> Any:
    def damage(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value

    return damage


def described(text: str | None) -> Any:
    def damage(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata.pop(METADATA_KEY)
        if text is not None:
            metadata[METADATA_KEY] = text

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (described(None), "holds no calibration"),
        (described("{"), "not valid JSON"),
        (described("[]"), "not a JSON object"),
        (lambda tensors, _: tensors.clear(), "has no layers"),
        (damaged("head.absmax", None), "layer head lacks its absmax"),
        (damaged("head.range", torch.ones(3)), "the range of layer head is torch.float32"),
        (damaged("head.mean_square", torch.ones(2)), "the mean_square of layer head is"),
        (damaged("head.absmax", torch.ones(1).half()), "the absmax of layer head is torch.float16"),
        (damaged("head.absmax", torch.tensor([torch.nan])), "not finite"),
        (damaged("head.sample", torch.ones(2, 3).bfloat16()), "the sample of layer head is"),
        (damaged("head.rows", torch.tensor([0])), "has seen 0 rows"),
    ],
)
def test_other_files_are_refused(saved: Path, damage: Any, message: str) -> None:
    tensors, metadata = load_file(saved), {METADATA_KEY: json.dumps({})}
    damage(tensors, metadata)
    save_file(tensors, saved, metadata)
    with pytest.raises(FileFormatError, match=message):
        load_calibration(saved)


def test_cut_off_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(0, len(content), 37):
        saved.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            load_calibration(saved)
