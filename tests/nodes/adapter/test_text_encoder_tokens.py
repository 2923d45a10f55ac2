"""Token ids of 200 prompts from the CLIPs that Snug builds equal those of the reference tokenizers.

The weights are tiny and only there to be loaded. The rebuilt vocabularies (UMT5, Gemma, Mistral) are not the
published ones, which tests cannot download: they are trained with the original libraries and settings
(tests/support/vocabularies.py), written as llama.cpp's converter does, and have 6,000 pieces. CLIP, T5, Qwen and
LLaMA 3 have the vocabularies that ComfyUI brings.

The reference for Mistral merges bytes by rank as tiktoken does, after ComfyUI's own split into words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import PROMPTS
from safetensors.torch import save_file
from small_text_encoders import (
    SmallCLIP,
    SmallT5,
    detect_as,
    load_dense,
    load_packed,
    random_weights,
    sizes,
    with_tokenizer,
)
from text_encoder_files import add, finish, write_text_encoder
from vocabularies import (
    TEKKEN_SPECIALS,
    sentencepiece_model,
    tekken,
    tekken_texts,
    write_sentencepiece,
    write_tekken,
)

ROWS = 6400
Encode = Callable[[str], list[int]]


def inner_tokenizer(clip: Any) -> Any:
    """ComfyUI's tokenizer of one text encoder, inside the one that adds templates."""
    from comfy.sd1_clip import SDTokenizer

    (found,) = [value for value in vars(clip.tokenizer).values() if isinstance(value, SDTokenizer)]
    return found


def check(clip: Any, reference: Encode, prompts: list[str] = PROMPTS) -> None:
    tokenizer = inner_tokenizer(clip).tokenizer
    for prompt in prompts:
        assert tokenizer(prompt)["input_ids"] == reference(prompt), prompt


def check_weighted(clip: Any, reference: Encode, special: set[int], prompts: list[str] = PROMPTS) -> None:
    """What CLIP Text Encode gets: each part between weights on its own, then starts, ends and padding."""
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    for prompt in prompts:
        parts = token_weights(escape_important(prompt), 1.0)
        wanted = [
            (number, weight) for text, weight in parts for number in reference(unescape_important(text))
        ]
        (batches,) = clip.tokenize(prompt).values()
        found = [(number, weight) for batch in batches for number, weight in batch]
        assert [pair for pair in found if pair[0] not in special] == [
            pair for pair in wanted if pair[0] not in special
        ], prompt


def same_as_dense(clip: Any, dense: Any) -> None:
    for prompt in PROMPTS:
        assert clip.tokenize(prompt) == dense.tokenize(prompt), prompt


# ---- vocabularies out of the file ------------------------------------------------------------------------------


def test_umt5(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from snug.nodes.adapter import text_encoder_kinds

    model, small = sentencepiece_model("unigram"), SmallT5(monkeypatch)
    small.vocab_size = ROWS
    weights = small.weights(comfy, umt5=True)
    detect_as(comfy, monkeypatch, "T5_XXL")
    monkeypatch.setitem(text_encoder_kinds.KINDS, "T5_XXL", ("UMT5-XXL", ("wan",)))
    dense = tmp_path / "dense.safetensors"
    save_file(with_tokenizer(weights, model), dense)
    path = write_text_encoder(
        tmp_path / "umt5.gguf",
        weights,
        "t5encoder",
        setup=lambda writer: write_sentencepiece(writer, model, "unigram", ROWS),
    )
    clip = load_packed(path, "wan")
    check(clip, lambda text: [*model.encode(text), model.eos_id()])
    check_weighted(clip, model.encode, {model.eos_id(), model.pad_id()})
    same_as_dense(clip, load_dense(comfy, dense, "wan"))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma(architecture: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from comfy.text_encoders import llama

    model = sentencepiece_model("bpe")
    name, kind = {"gemma2": ("Gemma2_2B", "GEMMA_2_2B"), "gemma3": ("Gemma3_4B", "GEMMA_3_4B")}[architecture]
    config = functools.partial(
        getattr(llama, f"{name}_Config"), **{**sizes(heads=(2, 1)), "vocab_size": ROWS}
    )
    monkeypatch.setattr(llama, f"{name}_Config", config)
    detect_as(comfy, monkeypatch, kind)
    module = getattr(llama, name)({}, torch.float32, "meta", comfy.ops.manual_cast)
    weights = random_weights(module, "Q8_0")
    dense = tmp_path / "dense.safetensors"
    save_file(with_tokenizer(weights, model), dense)
    path = write_text_encoder(
        tmp_path / "gemma.gguf",
        weights,
        architecture,
        setup=lambda writer: write_sentencepiece(writer, model, "bpe", ROWS),
    )
    clip = load_packed(path, "lumina2")
    # ComfyUI puts the ids of the published models' turn markers in by itself: not part of this vocabulary.
    prompts = [prompt for prompt in PROMPTS if "<end_of_turn>" not in prompt]
    assert len(prompts) >= len(PROMPTS) - 5
    check(clip, lambda text: model.encode(text, add_bos=True), prompts)
    same_as_dense(clip, load_dense(comfy, dense, "lumina2"))
    if architecture == "gemma2":
        check_weighted(clip, model.encode, {model.bos_id(), model.pad_id()}, prompts)


def tekken_reference() -> Encode:
    """Byte-pair encoding by rank (tiktoken's algorithm) on ComfyUI's words; special tokens are found first."""
    import regex
    from comfy.text_encoders import bpe_tokenizer

    ranks = {text: rank for rank, text in enumerate(tekken_texts())}
    specials = sorted(TEKKEN_SPECIALS, key=len, reverse=True)
    split = regex.compile("(" + "|".join(map(regex.escape, specials)) + ")")
    word_pattern = regex.compile(bpe_tokenizer._LLAMA_PATTERN)

    def merge(word: bytes) -> list[bytes]:
        parts = [bytes([value]) for value in word]
        while True:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(pairs, default=len(ranks))
            if best == len(ranks):
                return parts
            place = pairs.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

    def encode(text: str) -> list[int]:
        ids = []
        for part in split.split(text):
            if part in TEKKEN_SPECIALS:
                ids.append(TEKKEN_SPECIALS.index(part))
                continue
            for word in word_pattern.findall(part):
                ids += [len(TEKKEN_SPECIALS) + ranks[piece] for piece in merge(word.encode())]
        return ids

    return encode


def test_mistral(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ComfyUI 0.3.75 cannot build this tokenizer with transformers 5; test_text_encoders sees its error."""
    pytest.importorskip("comfy.text_encoders.bpe_tokenizer")
    from comfy.text_encoders import llama

    shape = {**sizes(hidden=64, layers=32, heads=(4, 2)), "vocab_size": ROWS}
    monkeypatch.setattr(
        llama, "Mistral3Small24BConfig", functools.partial(llama.Mistral3Small24BConfig, **shape)
    )
    detect_as(comfy, monkeypatch, "MISTRAL3_24B")
    weights = random_weights(llama.Mistral3Small24B({}, torch.float32, "meta", comfy.ops.manual_cast), "Q8_0")
    vocabulary = torch.frombuffer(bytearray(json.dumps(tekken()).encode()), dtype=torch.uint8)
    dense = tmp_path / "dense.safetensors"
    save_file({**weights, "tekken_model": vocabulary}, dense)
    path = write_text_encoder(
        tmp_path / "mistral.gguf",
        weights,
        "mistral3",
        heads=(4, 2),
        setup=lambda writer: write_tekken(writer, ROWS),
    )
    clip = load_packed(path, "flux2")
    check(clip, tekken_reference())
    same_as_dense(clip, load_dense(comfy, dense, "flux2"))


# ---- vocabularies that ComfyUI brings ----------------------------------------------------------------------------


def test_clip(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gguf
    import transformers

    weights = SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json")
    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    for name, tensor in weights.items():
        add(writer, name, tensor, "Q8_0")
    clip = load_packed(finish(writer, tmp_path / "clip.gguf"), "stable_diffusion")
    folder = Path(comfy.sd.__file__).parent / "sd1_tokenizer"
    original = transformers.AutoTokenizer.from_pretrained(folder)
    check(clip, lambda text: original(text)["input_ids"])
    check_weighted(clip, lambda text: original(text)["input_ids"][1:-1], {49406, 49407})


def test_t5(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    weights = SmallT5(monkeypatch).weights(comfy, umt5=False)
    detect_as(comfy, monkeypatch, "T5_XXL")
    clip = load_packed(write_text_encoder(tmp_path / "t5.gguf", weights, "t5encoder"), "chroma")
    folder = Path(comfy.sd.__file__).parent / "text_encoders" / "t5_tokenizer"
    original = getattr(transformers, "T5TokenizerFast").from_pretrained(folder)  # noqa: B009 (no stub names it)
    check(clip, lambda text: original(text)["input_ids"])
    check_weighted(clip, lambda text: original(text)["input_ids"][:-1], {0, 1})


LANGUAGE_MODELS = {
    "qwen25": ("QWEN25_3B", "qwen2vl", "Qwen25_3B", "omnigen2", "qwen25_tokenizer", 151936),
    "qwen3": ("QWEN3_4B", "qwen3", "Qwen3_4B", "lumina2", "qwen25_tokenizer", 151936),
    "llama3": ("LLAMA3_8", "llama", "Llama2", "hidream", "llama_tokenizer", 128256),
}


@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_language_models(case: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers
    from comfy.text_encoders import llama

    kind, architecture, model, clip_type, folder, rows = LANGUAGE_MODELS[case]
    path = Path(comfy.sd.__file__).parent / "text_encoders" / folder
    if not (path / "merges.txt").exists() and not (path / "tokenizer.json").exists():
        pytest.skip(f"this ComfyUI has no {folder}")
    shape = {**sizes(hidden=64, layers=4, heads=(4, 2)), "vocab_size": rows}
    config = functools.partial(getattr(llama, f"{model}Config"), **shape)
    monkeypatch.setattr(llama, f"{model}Config", config)
    detect_as(comfy, monkeypatch, kind)
    weights = random_weights(getattr(llama, model)({}, torch.float32, "meta", comfy.ops.manual_cast), "Q8_0")
    file = write_text_encoder(tmp_path / "te.gguf", weights, architecture, heads=(4, 2))
    clip = load_packed(file, clip_type)
    classes = {"llama_tokenizer": "LlamaTokenizerFast", "qwen25_tokenizer": "Qwen2Tokenizer"}
    original = getattr(transformers, classes[folder]).from_pretrained(path)
    tokenizer = clip.tokenizer.llama if case == "llama3" else inner_tokenizer(clip)
    for prompt in PROMPTS:
        assert tokenizer.tokenizer(prompt)["input_ids"] == original(prompt)["input_ids"], prompt
