"""Comparing pictures: which belong together, their numbers, the contact sheet, and what the node gives."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from snug.quant_backends.core.errors import SnugError


def measure(name: str) -> Any:
    """A module of the room, imported when ComfyUI can be."""
    return importlib.import_module(f"snug.nodes.measure.{name}")


def gather(*arguments: Any) -> Any:
    return measure("comparison").gather(*arguments)


def compare(*arguments: Any) -> Any:
    return measure("comparison").compare(*arguments)


def report_text(found: Any) -> str:
    return measure("comparison").report_text(found)


def contact_sheet(cells: list[tuple[torch.Tensor, str, str]]) -> torch.Tensor:
    sheet = measure("contact_sheet")
    return sheet.contact_sheet([sheet.Cell(*cell) for cell in cells])


def batch(seed: int, count: int = 1, height: int = 40, width: int = 48) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def noisy(image: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    return (image + strength * noise).clamp(0, 1)


def test_numbers_are_those_of_scikit_image() -> None:
    first = batch(1, 2)
    second = noisy(first, 0.05)
    found = compare(*gather([first, second], "dense\nQ4_K"), None)
    for index, score in enumerate(found.scores[1]):
        a, b = (picture[index].numpy() for picture in (first, second))
        assert score.psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
        expected = structural_similarity(
            a,
            b,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert score.ssim == pytest.approx(float(np.asarray(expected).mean()), abs=1e-3)
    report = report_text(found)
    assert report.splitlines()[0] == "1. dense (48 × 40): what the others are compared with"
    assert report.splitlines()[1].startswith("2. Q4_K (48 × 40): PSNR 26.")


def test_identical_images_are_called_so_and_json_has_no_infinity() -> None:
    first = batch(1, 2)
    second = first.clone()
    second[1] = noisy(first[1], 0.1)
    found = compare(*gather([first, second], ""), None)
    assert [
        score["identical"]
        for score in json.loads(measure("comparison").as_json(found))["pictures"][1]["scores"]
    ] == [
        True,
        False,
    ]
    assert measure("comparison").comparison_data(found)["pictures"][1]["scores"][0]["psnr"] is None
    assert "1 identical" in report_text(found)
    assert "inf" not in report_text(compare(*gather([first, first], ""), None))


def test_a_single_batch_is_taken_apart() -> None:
    series, count, notes = gather([batch(1, 3), None, None], "a\n\nc")
    assert [one.caption for one in series] == ["a", "Image 2", "c"]
    assert count == 1 and notes == [] and all(len(one.images) == 1 for one in series)


def test_batches_go_place_by_place_and_one_image_stands_for_all() -> None:
    series, count, notes = gather([batch(1), batch(2, 4), None, batch(3, 3)], "")
    assert count == 3 and "4" in notes[0] and "first 3" in notes[0]
    assert [one.caption for one in series] == ["Image 1", "Image 2", "Image 4"]
    found = compare(series, count, notes, None)
    assert [len(scores) for scores in found.scores] == [0, 3, 3]
    assert series[0].at(2).equal(series[0].at(0))


def test_very_long_batches_are_cut() -> None:
    series, count, notes = gather([batch(1, 300, 4, 4), batch(2, 300, 4, 4)], "")
    assert count == 256 and notes == ["Only the first 256 images of each batch are compared."]


def test_another_size_is_said_and_left_out_of_the_numbers() -> None:
    found = compare(*gather([batch(1), batch(2, height=20), batch(3)], "dense\nsmall"), None)
    assert [len(scores) for scores in found.scores] == [0, 0, 1]
    (note,) = found.notes
    assert note.startswith("Image 2 (small) is 48 × 20 pixels and the first 48 × 40")
    assert "another size" in report_text(found)


def test_pictures_smaller_than_the_window_have_no_ssim() -> None:
    found = compare(*gather([batch(1, height=8), batch(2, height=8)], ""), None)
    assert found.scores[1][0].ssim is None and "SSIM is left out" in found.notes[0]
    assert "SSIM" not in report_text(found).splitlines()[1]


def test_odd_images() -> None:
    """Gray ones, transparency, and values that are no numbers."""
    broken = batch(1)
    broken[0, 3, 4] = float("nan")
    alpha = torch.cat((batch(2), torch.ones(1, 40, 48, 1)), -1)
    series, _, notes = gather([batch(1)[..., :1], alpha, broken.half()], "")
    assert [one.images.shape[-1] for one in series] == [3, 3, 3]
    assert len(notes) == 1 and notes[0].startswith("Image 3 has pixels that are no numbers")
    assert torch.isfinite(series[2].images).all()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([batch(1)], "needs two"),
        ([batch(1, 17, 4, 4)], "17 images, and 16 at most"),
        ([batch(1), batch(2)[0]], r"image_2 is no batch of images: its shape is \(40, 48, 3\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(batches: list[torch.Tensor], message: str) -> None:
    with pytest.raises(SnugError, match=message):
        gather(batches, "")


# ---- contact sheet -----------------------------------------------------------------------------------------


def test_the_sheet_shows_every_picture_with_its_caption() -> None:
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0)]
    pictures = [torch.tensor(colour).expand(400, 500, 3) for colour in colours]
    sheet = contact_sheet([(picture, "Q4_K, 4.8 s", "PSNR 31.2 dB") for picture in pictures])
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.dtype == torch.float32
    for colour in colours:
        assert int((sheet[0] == torch.tensor(colour)).all(-1).sum()) == 400 * 500
    ground = int((sheet[0] == sheet[0, 0, 0]).all(-1).sum())
    assert sheet[0, ..., 0].numel() - ground - 4 * 400 * 500 > 2000, "captions are not drawn"
    assert float(sheet.min()) >= 0 and float(sheet.max()) <= 1


def test_the_sheet_enlarges_small_pictures_in_whole_steps_and_reduces_large_ones() -> None:
    small = torch.rand(16, 16, 3)
    cells = contact_sheet([(small, "a", ""), (small, "b", "")])
    assert cells.shape[2] == 2 * 16 + 2 * 320 + 12
    block = cells[0, 16:36, 16:36]
    assert (block == block[:1, :1]).all()
    large = contact_sheet([(torch.zeros(4096, 2048, 3), "a", "")])
    assert large.shape[2] == 2 * 16 + 512


def test_long_captions_stay_inside_their_cells() -> None:
    cells = [
        (torch.zeros(320, 320, 3), "wörter " * 40, "W" * 200),
        (torch.zeros(320, 320, 3), "", ""),
    ]
    sheet = contact_sheet(cells)
    ground = sheet[0, 0, 0]
    assert (sheet[0, :, 16 + 320 + 2 : 16 + 320 + 10] == ground).all()


# ---- LPIPS -------------------------------------------------------------------------------------------------


def test_lpips_needs_its_package_and_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the package but without the weights it is left out, and says so: nothing is loaded or downloaded."""
    find_lpips = measure("perceptual").find_lpips
    if importlib.util.find_spec("lpips") is None:
        assert find_lpips() == (None, "")
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / "__init__.py").write_text("raise RuntimeError('nobody may load this')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found, reason = find_lpips()
    assert found is None and "alexnet" in reason and str(tmp_path) not in reason


# ---- the node ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    from snug.nodes.compare_images import SnugCompareImages

    return SnugCompareImages.execute


def test_the_node(run: Any, tmp_path: Path) -> None:
    first = batch(1, 2)
    output = run(image_1=first, image_3=noisy(first, 0.2), captions="dense\n\nQ2_K")
    sheets, report, data = output.result
    assert sheets.shape[0] == 2 and not sheets[0].equal(sheets[1])
    assert "2. Q2_K" in report
    assert [picture["caption"] for picture in json.loads(data)["pictures"]] == ["dense", "Q2_K"]
    (shown,) = output.ui["snug_compare"]
    assert [len(picture["files"]) for picture in shown["pictures"]] == [2, 2]
    file = shown["pictures"][0]["files"][1]
    assert file["type"] == "temp"
    saved = Image.open(io.BytesIO((tmp_path / file["filename"]).read_bytes()))
    assert np.abs(np.asarray(saved) / 255 - first[1].numpy()).max() <= 1 / 255
    json.dumps(output.ui)  # as ComfyUI sends it


def test_two_runs_do_not_share_files(run: Any, tmp_path: Path) -> None:
    outputs = [run(image_1=batch(1), image_2=batch(2)) for _ in range(2)]
    names = [
        file["filename"]
        for output in outputs
        for p in output.ui["snug_compare"][0]["pictures"]
        for file in p["files"]
    ]
    assert len(set(names)) == len(list(tmp_path.iterdir())) == 4
