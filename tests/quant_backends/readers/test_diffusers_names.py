"""Renaming by itself; whether the names and rows are right is for the tests against ComfyUI's models to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_models import NARROW, tiny_diffusers_model
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.readers.diffusers_names import to_original_names

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def flux() -> State:
    return tiny_diffusers_model("flux", narrow=True).state_dict()


@pytest.mark.parametrize("family", NARROW)
def test_reference_names_and_what_needs_no_joining_are_the_same_objects(family: str) -> None:
    state = tiny_diffusers_model(family, narrow=True).state_dict()
    renamed = to_original_names(state)
    again = to_original_names(renamed)
    assert list(again) == list(renamed)
    assert all(again[name] is renamed[name] for name in renamed)
    kept = {id(value) for value in renamed.values()} & {id(value) for value in state.values()}
    if family == "qwen_image":
        assert renamed == state
    if family in ("qwen_image", "wan", "sdxl"):
        assert len(kept) == len(state)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("double_blocks.1.img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("double_blocks.1.txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("single_blocks.1.linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ],
)
@pytest.mark.parametrize("end", ["weight", "bias"])
def test_rows_of_fused_layers(target: str, parts: tuple[str, ...], end: str, flux: State) -> None:
    block = "transformer_blocks.1" if target.startswith("double") else "single_transformer_blocks.1"
    shuffled = dict(sorted(flux.items(), reverse=True))
    expected = torch.cat([flux[f"{block}.{part}.{end}"] for part in parts])
    found: Any = to_original_names(shuffled)[f"{target}.{end}"]
    assert torch.equal(found, expected)


def test_other_models_of_the_same_blocks_and_unknown_names_stay(flux: State) -> None:
    control = flux | {"controlnet_x_embedder.weight": torch.ones(1)}
    assert to_original_names(control) == control
    found = to_original_names(
        flux | {"new_part.weight": torch.ones(1), "transformer_blocks.0.new": torch.ones(1)}
    )
    assert {"new_part.weight", "transformer_blocks.0.new", "img_in.weight"} <= found.keys()
    animate = {
        "face_adapter.0.weight": torch.ones(1),
        **tiny_diffusers_model("wan", narrow=True).state_dict(),
    }
    assert to_original_names(animate) == animate


def test_progress_counts_bytes(flux: State) -> None:
    calls: list[tuple[int, int]] = []
    to_original_names(flux, lambda done, total: calls.append((done, total)))
    total = sum(value.nbytes for value in flux.values())
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_incomplete_layer_is_refused(flux: State) -> None:
    del (state := dict(flux))["single_transformer_blocks.0.proj_mlp.weight"]
    with pytest.raises(
        SnugError, match=r"incomplete: .* 'single_blocks.0.linear1.weight' it has only 'single_tr"
    ):
        to_original_names(state)


def test_parts_that_do_not_fit_are_refused(flux: State) -> None:
    name = "transformer_blocks.0.attn.to_k.weight"
    with pytest.raises(
        SnugError, match=r"'double_blocks.0.img_attn.qkv.weight' cannot be put together: .* columns"
    ):
        to_original_names(flux | {name: flux[name][:, :3]})
    with pytest.raises(
        SnugError, match=r"'final_layer.adaLN_modulation.1.bias' cannot be put together: .* halves"
    ):
        to_original_names(flux | {"norm_out.linear.bias": torch.ones(3)})


def test_two_tensors_for_one_place_are_refused() -> None:
    state = tiny_diffusers_model("sdxl", narrow=True).state_dict()
    state["class_embedding.linear_1.weight"] = state["add_embedding.linear_1.weight"]
    with pytest.raises(SnugError, match="Two tensors are the same part of 'label_emb.0.0.weight'"):
        to_original_names(state)
