"""What is made of weights: histogram, blocks, reasons, text, JSON, fit."""

from __future__ import annotations

import json

import pytest
import torch
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.inspection.blocks import OTHERS, group_blocks
from snug.quant_backends.inspection.choices import Choice, explain
from snug.quant_backends.inspection.fit import Demand, Device, Fit, estimate_fit
from snug.quant_backends.inspection.report import report
from snug.quant_backends.inspection.stored import StoredWeight, plain
from snug.quant_backends.inspection.summary import (
    MAX_METADATA,
    MAX_VALUE,
    Match,
    Summary,
    summarize,
    to_json,
)
from snug.quant_backends.memory.plan import Block

GB = 2**30


def packed(name: str, format: str, shape: tuple[int, ...]) -> StoredWeight:
    weights = torch.Size(shape).numel()
    return StoredWeight(name, format, shape, weights, FORMATS[format].nbytes(shape))


def flux() -> list[StoredWeight]:
    return [
        plain("img_in.weight", torch.bfloat16, (512, 64)),
        *(packed(f"double_blocks.{n}.img_attn.qkv.weight", "Q4_K", (1536, 512)) for n in range(3)),
        packed("double_blocks.0.img_mlp.2.weight", "Q6_K", (512, 2048)),
        packed("single_blocks.0.linear1.weight", "Q8_0", (512, 96)),
        plain("single_blocks.0.linear2.weight", torch.float16, (512, 100)),
        plain("single_blocks.0.linear1.bias", torch.float32, (512,)),
    ]


def choice_of(choices: list[Choice], name: str) -> Choice:
    return next(choice for choice in choices if name in choice.examples)


def test_reasons_and_islands() -> None:
    choices = explain(flux(), "flux")
    assert sum(choice.tensors for choice in choices) == len(flux())
    assert sum(choice.nbytes for choice in choices) == sum(weight.nbytes for weight in flux())
    main = choice_of(choices, "double_blocks.0.img_attn.qkv.weight")
    assert main.format == "Q4_K" and not main.is_island and "most weights" in main.reason
    for name, words in {
        "img_in.weight": "delicate layers of flux",
        "double_blocks.0.img_mlp.2.weight": "the writer's choice",
        "single_blocks.0.linear1.weight": "no multiple of the 256",
        "single_blocks.0.linear2.weight": "no multiple of the 256",
        "single_blocks.0.linear1.bias": "vectors",
    }.items():
        choice = choice_of(choices, name)
        assert words in choice.reason, name
        assert choice.is_island, name


def test_a_model_that_is_not_quantized_has_no_delicate_formats() -> None:
    weights = [plain(f"blocks.{n}.a.weight", torch.bfloat16, (64, 64)) for n in range(3)]
    (choice,) = explain(weights, None)
    assert "not quantized" in choice.reason and not choice.is_island
    assert explain([], "flux") == []


def test_blocks() -> None:
    names = [
        "input_blocks.0.0.weight",
        "input_blocks.10.1.transformer_blocks.0.attn1.to_q.weight",
        "input_blocks.2.0.in_layers.0.weight",
        "time_embed.0.weight",
        "txt_in.refiner.blocks.0.norm1.weight",
    ]
    groups = {group.name: group for group in group_blocks(plain(name, torch.float16, (8,)) for name in names)}
    assert list(groups) == ["input_blocks", "txt_in.refiner.blocks", OTHERS]
    assert groups["input_blocks"].blocks == (("input_blocks.2", 16), ("input_blocks.10", 16))
    assert groups[OTHERS].nbytes == 32


def device(free: float, is_gpu: bool = True) -> Device:
    return Device("a card", 12 * GB, int(free * GB), GB // 2, is_gpu)


def fit(free: float, is_gpu: bool = True, computing: int | None = 2 * GB) -> Fit:
    blocks = tuple(Block(f"blocks.{n}", (GB // 2,)) for n in range(16))
    return estimate_fit(device(free, is_gpu), Demand(blocks, GB, computing, "sampling"))


def test_what_fits_is_not_offloaded() -> None:
    found = fit(11.5)
    assert found.needed == int(11.5 * GB)
    assert (found.offloaded, found.offloaded_blocks, found.streaming) == (0, 0, "")
    assert "It fits: 11.5 GB are needed" in found.verdict


@pytest.mark.parametrize("free", [11.4, 8.0, 5.0])
def test_what_does_not_fit_is_offloaded(free: float) -> None:
    found = fit(free)
    assert found.offloaded == int(11.5 * GB) - int(free * GB)
    assert found.offloaded_blocks == -(-found.offloaded // (GB // 2))
    assert f"about {found.offloaded_blocks} of 16 blocks" in found.verdict
    assert found.streaming.startswith("With Group Offload: ")


def test_what_cannot_even_be_streamed_says_so() -> None:
    assert "cannot run it either" in fit(3.0).streaming
    assert "needs at least" in fit(3.6).streaming
    assert "swap" in fit(3.0, is_gpu=False).verdict
    assert "not known" in fit(11.5, computing=None).verdict


def summary() -> Summary:
    return summarize(
        "File: flux.gguf",
        flux(),
        "flux",
        facts={"size": "2.0 MB"},
        metadata={"note": "long " * 200, "x.weight": "{}", **{f"key{n}": (1,) * 50 for n in range(80)}},
        match=Match("Flux", ("missing.weight",), tuple(f"extra.{n}" for n in range(30))),
        fit=fit(8.0),
    )


def test_metadata_is_cut() -> None:
    shown = summary().metadata
    assert len(shown["note"]) == MAX_VALUE + 1
    assert shown["key0"].startswith("50 values: 1, 1")
    assert len(shown) == MAX_METADATA + 2
    assert shown["…"] == "21 more entries" and shown["of single tensors"] == "1 entries"


def test_text_names_everything() -> None:
    text = report(summary())
    for part in (
        "architecture:",
        "Q6_K",
        "double_blocks",
        "[precision island]",
        "Missing: 1: missing.weight",
    ):
        assert part in text
    assert "Unexpected: 30: extra.0" in text and "and 10 more" in text
    assert "ComfyUI would offload" in text and "note: long long" in text


def test_json_has_the_same_numbers() -> None:
    (found,) = json.loads(to_json([summary()]))
    assert found["bytes"] == sum(entry["nbytes"] for entry in found["formats"])
    assert found["bytes"] == sum(entry["bytes"] for entry in found["groups"])
    assert found["parameters"] == sum(weight.weights for weight in flux())
    assert found["match"]["missing"] == ["missing.weight"]
    assert found["fit"]["fits"] is False and found["fit"]["offloaded"] == summary().fit.offloaded  # type: ignore[union-attr]
