"""Which files are listed, and that the folder key shared with other packs is left alone when it exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folders(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """folder_paths with one diffusion-model folder that holds a file of every kind."""
    import folder_paths

    # Without the keys for .gguf files: another test of this process may have registered them, with the real folders.
    known = {
        key: value for key, value in folder_paths.folder_names_and_paths.items() if not key.endswith("_gguf")
    }
    known["diffusion_models"] = ([str(tmp_path)], {".safetensors", ".sft", ".ckpt"})
    known["text_encoders"] = ([str(tmp_path / "sub")], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "sub").mkdir()
    for name in ("b.gguf", "a.safetensors", "d.sft", "old.ckpt", "sub/c.GGUF"):
        (tmp_path / name).touch()
    yield folder_paths


def test_lists_both_kinds(folders: Any) -> None:
    from snug.nodes.adapter.folders import diffusion_model_files, find_diffusion_model, register

    register()
    listed = diffusion_model_files()
    assert [name.replace("\\", "/") for name in listed] == ["a.safetensors", "b.gguf", "d.sft", "sub/c.GGUF"]
    for name in listed:
        assert Path(find_diffusion_model(name)).is_file()


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path, comfy: Any) -> None:
    """Download caches keep such links when they are cleaned up."""
    from snug.nodes.adapter.folders import files_of, state_on_disk

    (tmp_path / "config.json").touch()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "blob")
    assert files_of(str(tmp_path)) == [str(tmp_path / "config.json")]
    assert len(state_on_disk(str(tmp_path))) == 1
    assert state_on_disk(str(tmp_path / "blob")) == ()


def test_key_follows_folders_added_later(folders: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.folders import diffusion_model_files, register

    register()
    later = tmp_path / "later"
    later.mkdir()
    (later / "late.gguf").touch()
    folders.add_model_folder_path("diffusion_models", str(later))
    assert "late.gguf" in diffusion_model_files()


def test_key_of_another_pack_is_not_disturbed(folders: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.folders import diffusion_model_files, register

    theirs = ([str(tmp_path / "sub")], {".gguf"})
    folders.folder_names_and_paths["unet_gguf"] = theirs
    register()
    assert folders.folder_names_and_paths["unet_gguf"] is theirs
    assert "c.GGUF" in diffusion_model_files()


def test_folders_in_diffusers_layout(folders: Any, tmp_path: Path) -> None:
    """Each is one entry, in place of the files in it, also where ComfyUI keeps whole pipelines."""
    from snug.nodes.adapter.folders import (
        diffusion_model_files,
        find_diffusion_model,
        register,
        state_on_disk,
    )
    from snug.quant_backends.core.errors import SnugError

    folders.folder_names_and_paths["diffusers"] = ([str(tmp_path / "pipelines")], ["folder"])
    register()
    for name in ("sub/flux", "pipelines/flux pipeline/transformer"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"1234")
    (tmp_path / "pipelines" / "flux pipeline" / "model_index.json").write_text("{}")
    names = diffusion_model_files()
    assert "sub/flux/" in names and "flux pipeline/" in names
    assert not any("diffusion_pytorch_model" in name for name in names)
    found = find_diffusion_model("flux pipeline/")
    before = state_on_disk(found)
    (Path(found) / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345")
    assert state_on_disk(found) != before
    for gone in ("gone/", "../", "sub/../../"):
        with pytest.raises(SnugError, match="was not found"):
            find_diffusion_model(gone)


def test_text_encoders(folders: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.folders import find_text_encoder, register, text_encoder_files
    from snug.quant_backends.core.errors import SnugError

    (tmp_path / "sub" / "t5.safetensors").touch()
    register()
    assert text_encoder_files() == ["c.GGUF", "t5.safetensors"]
    assert all(Path(find_text_encoder(name)).is_file() for name in text_encoder_files())
    with pytest.raises(SnugError, match=r"The text encoder 'gone\.gguf' was not found in .*press R"):
        find_text_encoder("gone.gguf")


@pytest.mark.parametrize(
    "library,key", [("LORAS", "loras"), ("CHECKPOINTS", "checkpoints"), ("CONTROLNETS", "controlnet")]
)
def test_gguf_beside_safetensors(library: str, key: str, folders: Any, tmp_path: Path) -> None:
    """Keys of Snug's own, as other packs share none; ComfyUI's lists stay as they are."""
    from snug.nodes.adapter import folders as libraries

    extensions = {".safetensors", ".sft", ".ckpt"}
    folders.folder_names_and_paths[key] = ([str(tmp_path)], extensions)
    libraries.register()
    found = getattr(libraries, library)
    assert [name.replace("\\", "/") for name in found.files()] == [
        "a.safetensors",
        "b.gguf",
        "d.sft",
        "sub/c.GGUF",
    ]
    assert found.find("b.gguf") == str(tmp_path / "b.gguf")
    assert "b.gguf" not in folders.get_filename_list(key) and ".gguf" not in extensions


def test_a_vision_part_put_beside_its_text_encoder_is_noticed(folders: Any, tmp_path: Path) -> None:
    """The error about a missing one tells people to put it there; what ComfyUI has kept is then out of date."""
    from snug.nodes.adapter.folders import register
    from snug.nodes.load_text_encoders import SnugLoadTextEncoders

    register()
    ask = SnugLoadTextEncoders.fingerprint_inputs
    alone = ask("c.GGUF", "qwen_image")
    assert ask("c.GGUF", "qwen_image") == alone
    (tmp_path / "sub" / "mmproj.gguf").touch()
    assert ask("c.GGUF", "qwen_image") != alone
    assert ask("c.GGUF", "qwen_image", mmproj="none") == ask("c.GGUF", "qwen_image", mmproj="none")


def test_a_checkpoint_beside_text_encoders(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LTX-2's, with its projection: taken for a file more, and noticed when it changes."""
    import folder_paths
    from snug.nodes import load_text_encoders

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "checkpoints", ([str(checkpoints)], {".safetensors"})
    )
    for path in (tmp_path / "sub" / "gemma.safetensors", checkpoints / "ltx2.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    loaded: list[Any] = []
    monkeypatch.setattr(load_text_encoders, "load_text_encoders", lambda *args: loaded.append(args))
    node = load_text_encoders.SnugLoadTextEncoders
    chosen = {"text_encoder_1": "gemma.safetensors", "type": "ltxv", "checkpoint": "ltx2.safetensors"}
    node.execute(**chosen)
    assert loaded[0][0] == [
        str(tmp_path / "sub" / "gemma.safetensors"),
        str(checkpoints / "ltx2.safetensors"),
    ]
    before = node.fingerprint_inputs(**chosen)
    assert node.fingerprint_inputs(**{**chosen, "checkpoint": "none"}) != before
    (checkpoints / "ltx2.safetensors").write_bytes(b"more")
    assert node.fingerprint_inputs(**chosen) != before


def test_a_text_encoder_from_another_node_is_not_known_yet(folders: Any) -> None:
    """ComfyUI asks with None; an exception would count as a change on every run."""
    from snug.nodes.load_text_encoders import SnugLoadTextEncoders

    ask = SnugLoadTextEncoders.fingerprint_inputs
    assert ask(None, "sd3", text_encoder_2=None) == ask(None, "sd3", text_encoder_2=None)


def test_a_combo_without_files_says_where_they_belong(folders: Any, tmp_path: Path) -> None:
    """An empty list is shown as "undefined", and refused without a word about folders."""
    from snug.nodes.adapter.folders import register
    from snug.nodes.calibrate import SnugLoadCalibration
    from snug.nodes.load_checkpoint import SnugLoadCheckpoint
    from snug.nodes.load_controlnet import SnugLoadControlNet
    from snug.nodes.load_diffusion_model import SnugLoadDiffusionModel
    from snug.nodes.load_lora import SnugLoadLora
    from snug.nodes.load_text_encoders import SnugLoadTextEncoders
    from snug.quant_backends.core.errors import SnugError

    empty = tmp_path / "empty"
    empty.mkdir()
    nodes: dict[str, tuple[Any, dict[str, Any]]] = {
        "diffusion_models": (SnugLoadDiffusionModel, {"compute_dtype": "auto"}),
        "text_encoders": (SnugLoadTextEncoders, {"type": "flux"}),
        "checkpoints": (SnugLoadCheckpoint, {"compute_dtype": "auto"}),
        "loras": (SnugLoadLora, {"strength_model": 1.0, "strength_clip": 1.0}),
        "controlnet": (SnugLoadControlNet, {}),
        "snug_calibrations": (SnugLoadCalibration, {}),
    }
    known = folders.folder_names_and_paths
    known.update({key: ([str(empty)], {".safetensors"}) for key in nodes})
    known.pop("diffusers", None)
    register()
    for key, (node, others) in nodes.items():
        first = next(entry for entry in node.define_schema().inputs if hasattr(entry, "options"))
        assert first.options == [f"no files in models/{key}"]
        way = (
            "save one with Calibrate"
            if key == "snug_calibrations"
            else r"put a \.safetensors or \.gguf file there"
        )
        with pytest.raises(SnugError, match=rf"There was no .* in {re.escape(str(empty))}: {way}.*, press R"):
            node.execute(**{first.id: first.options[0]}, **others)
