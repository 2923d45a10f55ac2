"""Every target times every family of text encoders: quantize, encode, save, load, encode, the same to the last bit.

Vocabularies are cut and each block is in another format, so that it takes seconds; tokens are numbers below the size
of the vocabulary. What tokenizers give is for test_saving_text_encoders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from encoder_families import FAMILIES, Builder
from small_text_encoders import PROMPT, load_packed

KINDS = [
    "CLIP_L",
    "T5_XXL",
    "LLAMA3_8",
    "QWEN3_4B",
    "QWEN25_7B",
    "GEMMA_2_2B",
    "GEMMA_3_4B",
    "MINISTRAL_3_3B",
]
# How many tokens are left; 384 is a number of T5's that needs no tokenizer in the file.
CUT = {"CLIP_L": 6200, "T5_XXL": 384, "LLAMA3_8": 6200, "QWEN3_4B": 6200, "QWEN25_7B": 6200}
IN_SAFETENSORS = ("CLIP_L", "T5_XXL", "QWEN3_4B")
BLOCKS = 4


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Building a CLIP again and again, tokenizers are read once."""
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        for name in ("Qwen2Tokenizer", "LlamaTokenizerFast", "T5TokenizerFast", "CLIPTokenizer"):
            kind = getattr(transformers, name, None)
            if kind is not None:
                patch.setattr(kind, "from_pretrained", functools.lru_cache(kind.from_pretrained))
        yield patch


@pytest.fixture(scope="module")
def dense(
    comfy: Any, patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    import folder_paths

    folder = tmp_path_factory.mktemp("encoders")
    patch.setattr(folder_paths, "output_directory", str(folder / "output"))

    @functools.cache
    def make(kind: str) -> Any:
        return Builder(comfy, patch, folder).make(kind, CUT.get(kind, 0))

    return make


def conditioning(clip: Any, kind: str) -> torch.Tensor:
    """Of the prompt's tokens, taken modulo the size of the vocabulary."""
    tokens = clip.tokenize(PROMPT)
    if kind in CUT:
        tokens = {
            name: [[(token % CUT[kind], *rest) for token, *rest in batch] for batch in batches]
            for name, batches in tokens.items()
        }
    found = clip.encode_from_tokens(tokens, return_dict=True)
    return found.get("conditioning_llama3", found["cond"])


def packed(clip: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Format and bytes of every packed weight."""
    from snug.nodes.adapter.packed_module import packed_modules

    return {
        name: (layer.weight.params.format, layer.weight._qdata.view(torch.uint8).view(-1))
        for name, layer in packed_modules(clip.patcher.model)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_target(kind: str, dense: Callable[[str], Any]) -> None:
    """Each block of an encoder in another target of a backend, so that one file holds several."""
    from snug.nodes.adapter.quantizing import QuantizeSettings, available_targets, quantize_clip
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders
    from snug.quant_backends.quantization import find_target

    clip = dense(kind)
    by_backend: dict[str, list[str]] = {}
    for target in available_targets():
        by_backend.setdefault(find_target(target).backend, []).append(target)
    seen = set()
    for backend, names in by_backend.items():
        if backend != "gguf" and kind not in IN_SAFETENSORS:
            continue
        for first in range(0, len(names), BLOCKS):
            quantized = clip
            for block, target in enumerate(names[first : first + BLOCKS]):
                others = rf"default, (layers|block)\.(?!{block}\.)\d+\., visual"
                quantized, _ = quantize_clip(quantized, QuantizeSettings(target, skip=others))
                seen.add(target)
            wanted = conditioning(quantized, kind)
            container, ending = ("GGUF", ".gguf") if backend == "gguf" else ("auto", ".safetensors")
            (path,) = save_text_encoders(quantized, SaveSettings("encoder", container, collision="replace"))
            again = load_packed(path, FAMILIES[kind].clip_type)
            given, found = packed(quantized), packed(again)
            assert path.suffix == ending and given.keys() <= found.keys()
            for name, (format, data) in given.items():
                assert found[name][0] == format and torch.equal(found[name][1], data), (name, format)
            assert wanted.isfinite().all() and wanted.std() > 0.01, names
            assert torch.equal(conditioning(again, kind), wanted), names[first : first + BLOCKS]
    assert len(seen) == (len(available_targets()) if kind in IN_SAFETENSORS else len(by_backend["gguf"]))
