"""Blind tests: figures against scipy, rounds as files, and that nothing given to the page tells which is which."""

from __future__ import annotations

import collections
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom, binomtest
from snug.quant_backends.core.errors import SnugError


def measure(name: str) -> Any:
    """A module of the room, imported when ComfyUI can be."""
    return importlib.import_module(f"snug.nodes.measure.{name}")


# ---- figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 20, 200])
def test_figures_are_scipys(count: int) -> None:
    statistics = measure("blind_statistics")
    for right in {0, 1, count // 2, (3 * count) // 4, count}:
        test = binomtest(right, count, 0.5, alternative="greater")
        assert statistics.p_value(right, count) == pytest.approx(test.pvalue, rel=1e-9)
        interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert statistics.wilson_interval(right, count) == pytest.approx(
            (interval.low, interval.high), abs=1e-9
        )


def test_the_result_in_words() -> None:
    statistics = measure("blind_statistics")
    sentence = statistics.evaluate(14, 6, 0).sentence("Q4_K")
    assert sentence.startswith("You found Q4_K 14 of 20 times; by guessing this happens in 5.8% of tries.")
    assert "is not shown" in sentence
    certain = statistics.evaluate(20, 0, 3).sentence("Q2_K")
    assert "less than 0.1%" in certain and "In 3 more you could not tell" in certain
    assert certain.endswith("You can tell them apart.")
    assert (
        statistics.evaluate(0, 0, 4).sentence("Q8_0").startswith("You could not tell Q8_0 from the reference")
    )
    assert statistics.p_value(0, 0) == 1 and statistics.wilson_interval(0, 0) == (0, 1)


# ---- order -----------------------------------------------------------------------------------------------------


def test_the_order_follows_from_the_seed_and_uses_pairs_evenly() -> None:
    arrange = measure("blind_rounds").arrange
    assert arrange("a", 4, 10) == arrange("a", 4, 10) != arrange("b", 4, 10)
    counts = collections.Counter(pair for pair, _ in arrange("a", 4, 10))
    assert sorted(counts.values()) == [2, 2, 3, 3]


def test_guessing_is_right_as_often_as_the_binomial_distribution_says() -> None:
    """A guesser who takes each side equally often: with as many of each side the spread would be another one."""
    arrange = measure("blind_rounds").arrange
    rounds, trials = 2000, 20
    found = [
        sum(side == 1 + place % 2 for place, (_, side) in enumerate(arrange(str(seed), 5, trials)))
        for seed in range(rounds)
    ]
    at_least_14 = np.mean([number >= 14 for number in found])
    expected = binom.sf(13, trials, 0.5)
    assert at_least_14 == pytest.approx(expected, abs=4 * math.sqrt(expected / rounds))
    assert np.mean(found) == pytest.approx(10, abs=0.25)


# ---- rounds ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path: Path) -> Any:
    return measure("blind_rounds").Rounds(tmp_path / "rounds")


def files(count: int) -> list[tuple[dict[str, str], dict[str, str]]]:
    def file(name: str) -> dict[str, str]:
        return {"filename": name, "subfolder": "", "type": "temp"}

    return [(file(f"reference {number}"), file(f"quantized {number}")) for number in range(count)]


def is_quantized(picture: dict[str, str]) -> bool:
    return picture["filename"].startswith("quantized")


def test_a_round_to_its_end(rounds: Any) -> None:
    shown = rounds.begin("Q4_K", "seed", files(3), (64, 32), 8)
    assert shown["quantized"] is None and shown["result"] is None and not shown["finished"]
    sides = [1 + is_quantized(right) for _, right in shown["trials"]]
    votes = [*sides[:5], 3 - sides[5], 0]
    for trial, vote in enumerate(votes):
        shown = rounds.vote(shown["round"], trial, vote)
        assert shown["result"] is None and shown["quantized"] is None
    shown = rounds.vote(shown["round"], 5, sides[5])  # votes may be changed until the end
    shown = rounds.vote(shown["round"], 7, sides[7])
    assert shown["finished"] and shown["quantized"] == sides
    result = shown["result"]
    assert (result["right"], result["wrong"], result["undecided"]) == (7, 0, 1)
    assert result["p_value"] == pytest.approx(0.5**7)
    with pytest.raises(SnugError, match="has ended"):
        rounds.vote(shown["round"], 0, 1)
    # It is all in the file, whose name is the round's.
    (path,) = rounds.folder.iterdir()
    assert path.name == f"{shown['round']}.json" and json.loads(path.read_text())["result"] == result
    assert measure("blind_rounds").Rounds(rounds.folder).show(shown["round"]) == shown


def test_ended_early_and_begun_anew(rounds: Any) -> None:
    shown = rounds.begin("Q4_K", "seed", files(4), (64, 32), 12)
    with pytest.raises(SnugError, match="no vote yet"):
        rounds.finish(shown["round"])
    rounds.vote(shown["round"], 0, 1)
    ended = rounds.finish(shown["round"])
    assert ended["finished"] and ended["result"]["right"] + ended["result"]["wrong"] == 1
    again = rounds.restart(shown["round"])
    assert again["votes"] == [None] * 12 and again["quantized"] is None and again["result"] is None
    assert again["trials"] != shown["trials"]
    # Still a reference and a quantized picture of one pair each.
    for pair in again["trials"]:
        assert sorted(map(is_quantized, pair)) == [False, True]
        assert len({picture["filename"].split()[1] for picture in pair}) == 1


def test_what_cannot_be_voted_on(rounds: Any, tmp_path: Path) -> None:
    shown = rounds.begin("Q4_K", "seed", files(2), (64, 32), 4)
    for trial, vote in ((4, 1), (-1, 1), (0, 3)):
        with pytest.raises(SnugError, match="does not exist"):
            rounds.vote(shown["round"], trial, vote)
    missing = measure("blind_rounds").NoSuchRound
    for round_id in ("../secret", "20200101-000000-00000000", "", "x" * 500):
        with pytest.raises(missing):
            rounds.show(round_id)
    for text in ("", "[]", "{}", '{"trials": 3}'):
        rounds.path(shown["round"]).write_text(text)
        with pytest.raises(missing, match="cannot be read"):
            rounds.show(shown["round"])


def test_a_full_disk_leaves_the_file_as_it_was(rounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = rounds.begin("Q4_K", "seed", files(2), (64, 32), 4)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(SnugError, match="could not be saved .*No space left"):
            rounds.vote(shown["round"], 0, 1)
    assert rounds.show(shown["round"]) == shown
    assert len(list(rounds.folder.iterdir())) == 1


# ---- the node --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    rounds = measure("blind_rounds").Rounds(tmp_path / "rounds")
    node = importlib.import_module("snug.nodes.blind_test")
    monkeypatch.setattr(node, "rounds", lambda: rounds)

    def execute(reference: torch.Tensor, quantized: torch.Tensor, **settings: Any) -> dict[str, Any]:
        inputs = {"name": "Q4_K", "trials": 6, "round": 1, **settings}
        (shown,) = node.SnugBlindTest.execute(reference, quantized, **inputs).ui["snug_blind"]
        return shown

    return execute


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 16, 24, 3, generator=torch.Generator().manual_seed(seed))


def test_the_page_cannot_know_which_is_which(run: Any, tmp_path: Path) -> None:
    reference, quantized = pictures(3, 1), pictures(3, 2)
    shown = run(reference, quantized)
    assert shown["quantized"] is None and not {"pair", "seed"} & set(shown)
    assert (shown["width"], shown["height"], len(shown["trials"])) == (24, 16, 6)
    key = json.loads((tmp_path / "rounds" / f"{shown['round']}.json").read_text())["trials"]
    levels = (quantized.clamp(0, 1) * 255).to(torch.uint8)
    for trial, pair in zip(key, shown["trials"], strict=True):
        image = Image.open(tmp_path / "temp" / pair[trial["quantized"] - 1]["filename"])
        assert image.info == {}, "the prompt in it would name the model"
        assert np.array_equal(np.asarray(image), levels[trial["pair"]].numpy())
    names = {picture["filename"] for pair in shown["trials"] for picture in pair}
    assert len(names) == 6


def test_neither_names_nor_times_of_pictures_tell_their_kind() -> None:
    """They are saved in an order drawn anew each time, under names without meaning."""
    pairs = [(torch.zeros(4, 4, 3, dtype=torch.uint8), torch.ones(4, 4, 3, dtype=torch.uint8))] * 2
    firsts = []
    for _ in range(60):
        saved: list[tuple[bool, str]] = []

        def save(
            images: torch.Tensor, prefix: str, saved: list[tuple[bool, str]] = saved
        ) -> list[dict[str, str]]:
            saved.append((bool(images.any()), prefix))
            return [{"filename": prefix, "subfolder": "", "type": "temp"}]

        found = measure("blind_pairs").save_pairs(pairs, save)
        assert all(re.fullmatch(r"snug_blind_[0-9a-f]{16}", name) for _, name in saved)
        kinds = {name: kind for kind, name in saved}
        assert [[kinds[one["filename"]] for one in pair] for pair in found] == [[False, True]] * 2
        firsts.append(saved[0][0])
    assert 10 < sum(firsts) < 50


def test_the_same_round_has_the_same_order_and_another_one_another(run: Any, tmp_path: Path) -> None:
    def sides(**settings: Any) -> list[tuple[int, int]]:
        shown = run(pictures(3, 1), pictures(3, 2), trials=12, **settings)
        key = json.loads((tmp_path / "rounds" / f"{shown['round']}.json").read_text())["trials"]
        return [(trial["pair"], trial["quantized"]) for trial in key]

    assert sides() == sides() != sides(round=2)


def test_equal_pairs_are_left_out(run: Any) -> None:
    reference, quantized = pictures(3, 1), pictures(3, 2)
    quantized[1] = reference[1] = 0.5
    assert run(reference, quantized)["notes"] == ["1 of 3 pairs are equal in every pixel and left out."]


@pytest.mark.parametrize(
    ("reference", "quantized", "message"),
    [
        (pictures(2, 1), pictures(2, 1), "All pairs are equal"),
        (pictures(2, 1), pictures(3, 2), "2 images and quantized 3"),
        (pictures(2, 1), pictures(2, 2)[:, :8], "24 × 16 pixels and quantized 24 × 8"),
    ],
)
def test_what_is_no_test(run: Any, reference: torch.Tensor, quantized: torch.Tensor, message: str) -> None:
    with pytest.raises(SnugError, match=message):
        run(reference, quantized)
