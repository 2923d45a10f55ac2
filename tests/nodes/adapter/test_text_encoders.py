"""Conditioning from a GGUF text encoder equals that of the dense one through ComfyUI's own loader.

ComfyUI's text-model classes are built smaller than they are: their configurations are replaced by name, and its
detection, which looks at full sizes, is told the kind. Everything else is the ordinary way of a file.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from text_encoder_files import snap, write_mmproj, write_text_encoder

PROMPT = "a red fox under the moon, 水彩画"


@dataclass(frozen=True)
class Small:
    """A text encoder of reduced size. architecture: llama.cpp's. model, config: names in ComfyUI's llama module."""

    architecture: str
    clip_type: str
    model: str
    config: str
    sizes: dict[str, int]
    tokenizer_folder: str = "qwen25_tokenizer"
    format: str = "Q8_0"
    heads: tuple[int, int] = (8, 4)
    options: dict[str, Any] = field(default_factory=dict)


def sizes(hidden: int = 128, layers: int = 4, heads: tuple[int, int] = (8, 4)) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }


SMALL = {
    "QWEN25_7B": Small("qwen2vl", "qwen_image", "Qwen25_7BVLI", "Qwen25_7BVLI_Config", sizes()),
    "QWEN25_3B": Small("qwen2vl", "omnigen2", "Qwen25_3B", "Qwen25_3BConfig", sizes(), format="Q4_0"),
    "QWEN3_4B": Small("qwen3", "lumina2", "Qwen3_4B", "Qwen3_4BConfig", sizes(), format="F16"),
    "LLAMA3_8": Small(
        "llama", "hidream", "Llama2", "Llama2Config", {**sizes(), "vocab_size": 128256}, "llama_tokenizer"
    ),
}


@pytest.fixture(autouse=True)
def small_vision(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.text_encoders import qwen_vl

    tower = functools.partial(
        qwen_vl.Qwen2VLVisionTransformer, num_layers=2, intermediate_size=96, num_heads=4
    )

    def build(hidden_size: int, **options: Any) -> Any:
        return tower(hidden_size=128, **options)

    monkeypatch.setattr(qwen_vl, "Qwen2VLVisionTransformer", build)


@pytest.fixture
def detected(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """detected(kind): ComfyUI takes every file for one of that kind."""

    def pretend(kind: str) -> None:
        monkeypatch.setattr(comfy.sd, "detect_te_model", lambda shapes: comfy.sd.TEModel[kind])

    return pretend


def random_weights(module: torch.nn.Module, format: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for a module on the meta device, matrices on the grid of `format`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 2 and value.shape[1] % 32 == 0:
            weights[name] = snap(noise / value.shape[1] ** 0.5, format)
        else:
            weights[name] = 0.1 * noise + (1 if "norm" in name and value.dim() == 1 else 0)
    return weights


def text_only(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("visual.")}


def load_dense(comfy: Any, path: Path, clip_type: str) -> Any:
    kind = getattr(comfy.sd.CLIPType, clip_type.upper())
    return comfy.sd.load_clip([str(path)], clip_type=kind, model_options={"dtype": torch.float32})


def load_packed(path: Path, clip_type: str, **options: Any) -> Any:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    return load_text_encoders([str(path)], clip_type, **options)


def encode(clip: Any, prompt: str = PROMPT, **options: Any) -> torch.Tensor:
    """HiDream keeps LLaMA's output beside the conditioning of T5."""
    found = clip.encode_from_tokens(clip.tokenize(prompt, **options), return_dict=True)
    return found.get("conditioning_llama3", found["cond"])


@pytest.fixture
def make(
    comfy: Any, comfyui_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detected: Any
) -> Callable[[str], tuple[Path, Path, dict[str, torch.Tensor]]]:
    """make(kind) writes (GGUF, dense twin) and returns them with the weights."""
    from comfy.text_encoders import llama

    def write(kind: str) -> tuple[Path, Path, dict[str, torch.Tensor]]:
        small = SMALL[kind]
        folder = comfyui_path / "comfy" / "text_encoders" / small.tokenizer_folder
        if not any(folder.glob("*merges.txt")) and not (folder / "tokenizer.json").exists():
            pytest.skip(f"this ComfyUI has no {small.tokenizer_folder}")
        config = functools.partial(getattr(llama, small.config), **small.sizes)
        monkeypatch.setattr(llama, small.config, config)
        detected(kind)
        module = getattr(llama, small.model)({}, torch.float32, "meta", comfy.ops.manual_cast)
        weights = random_weights(module, small.format)
        dense = tmp_path / "dense.safetensors"
        save_file(weights, dense)
        path = tmp_path / "encoder.gguf"
        write_text_encoder(path, text_only(weights), small.architecture, small.format, small.heads)
        return path, dense, weights

    return write


@pytest.mark.parametrize("kind", SMALL)
def test_conditioning_equals_the_dense_twin(kind: str, make: Any, comfy: Any) -> None:
    path, dense, _ = make(kind)
    wanted = encode(load_dense(comfy, dense, SMALL[kind].clip_type))
    found = encode(load_packed(path, SMALL[kind].clip_type))
    assert wanted.isfinite().all() and wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class SmallT5:
    """ComfyUI's T5 with another configuration."""

    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from comfy.text_encoders import t5

        self.original = t5.T5
        self.vocab_size = 32128
        monkeypatch.setattr(t5, "T5", self)

    def __call__(self, config: dict[str, Any], *args: Any) -> Any:
        return self.original({**config, **self.sizes, "vocab_size": self.vocab_size}, *args)

    def weights(self, comfy: Any, umt5: bool) -> dict[str, torch.Tensor]:
        folder = Path(comfy.sd.__file__).parent / "text_encoders"
        config = json.loads((folder / f"{'u' * umt5}{'m' * umt5}t5_config_xxl.json").read_text())
        return random_weights(self(config, torch.float32, "meta", comfy.ops.manual_cast), "Q8_0")


def test_t5(comfy: Any, monkeypatch: pytest.MonkeyPatch, detected: Any, tmp_path: Path) -> None:
    weights = SmallT5(monkeypatch).weights(comfy, umt5=False)
    detected("T5_XXL")
    dense = tmp_path / "dense.safetensors"
    save_file(weights, dense)
    path = write_text_encoder(tmp_path / "t5.gguf", weights, "t5encoder")
    prompt = "a (red:1.3) fox under the moon"
    wanted = encode(load_dense(comfy, dense, "chroma"), prompt)
    found = encode(load_packed(path, "chroma"), prompt)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def tiny_sentencepiece(kind: str) -> Any:
    """A model trained on a few words, with the special pieces of UMT5 (unigram) or Gemma (bpe)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    target = io.BytesIO()
    bos, unk = (-1, 2) if kind == "unigram" else (2, 3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "a blue hare over the sun", "the red moon"] * 30),
        model_writer=target,
        model_type=kind,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="nmt_nfkc" if kind == "unigram" else "identity",
        add_dummy_prefix=kind == "unigram",
        remove_extra_whitespaces=kind == "unigram",
        pad_piece="<pad>",
        bos_piece="<bos>",
        pad_id=0,
        eos_id=1,
        bos_id=bos,
        unk_id=unk,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=target.getvalue())


def add_vocabulary(writer: Any, model: Any, kind: str, rows: int) -> None:
    """As llama.cpp writes a SentencePiece model, padded to the rows of the embedding table."""
    count = model.get_piece_size()
    checks = ((2, model.is_unknown), (3, model.is_control), (6, model.is_byte))
    types = [next((t for t, check in checks if check(n)), 1) for n in range(count)]
    writer.add_tokenizer_model("t5" if kind == "unigram" else "llama")
    writer.add_token_list([*map(model.id_to_piece, range(count)), *(f"[PAD{n}]" for n in range(count, rows))])
    writer.add_token_scores([*map(model.get_score, range(count)), *[-1000.0] * (rows - count)])
    writer.add_token_types(types + [5] * (rows - count))
    writer.add_add_space_prefix(kind == "unigram")
    writer.add_eos_token_id(model.eos_id())
    writer.add_pad_token_id(model.pad_id())
    writer.add_unk_token_id(model.unk_id())
    if kind == "bpe":
        writer.add_bos_token_id(model.bos_id())


def with_tokenizer(weights: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """A dense file as ComfyUI's own, with the tokenizer in a tensor."""
    proto = torch.frombuffer(bytearray(model.serialized_model_proto()), dtype=torch.uint8)
    return {**weights, "spiece_model": proto}


def test_umt5(comfy: Any, monkeypatch: pytest.MonkeyPatch, detected: Any, tmp_path: Path) -> None:
    model = tiny_sentencepiece("unigram")
    small = SmallT5(monkeypatch)
    small.vocab_size = 512
    weights = small.weights(comfy, umt5=True)
    detected("T5_XXL")
    monkeypatch.setitem(kinds().KINDS, "T5_XXL", ("UMT5-XXL", ("wan",)))
    dense = tmp_path / "dense.safetensors"
    save_file(with_tokenizer(weights, model), dense)
    path = tmp_path / "umt5.gguf"
    write_text_encoder(
        path, weights, "t5encoder", setup=lambda writer: add_vocabulary(writer, model, "unigram", 512)
    )
    reference, packed = load_dense(comfy, dense, "wan"), load_packed(path, "wan")
    assert packed.tokenize(PROMPT) == reference.tokenize(PROMPT)
    wanted = encode(reference)
    assert wanted.std() > 0.01
    torch.testing.assert_close(encode(packed), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind,architecture", [("GEMMA_2_2B", "gemma2"), ("GEMMA_3_4B", "gemma3")])
def test_gemma(
    kind: str, architecture: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, detected: Any, tmp_path: Path
) -> None:
    from comfy.text_encoders import llama

    model = tiny_sentencepiece("bpe")
    name = {"gemma2": "Gemma2_2B", "gemma3": "Gemma3_4B"}[architecture]
    config = functools.partial(getattr(llama, f"{name}_Config"), **{**sizes(heads=(2, 1)), "vocab_size": 512})
    monkeypatch.setattr(llama, f"{name}_Config", config)
    detected(kind)
    module = getattr(llama, name)({}, torch.float32, "meta", comfy.ops.manual_cast)
    weights = random_weights(module, "Q8_0")
    for key in weights:
        if key.endswith("norm.weight"):  # on a grid that adding 1 does not leave
            weights[key] = (weights[key] * 16).round() / 64
    dense = tmp_path / "dense.safetensors"
    save_file(with_tokenizer(weights, model), dense)
    path = tmp_path / "gemma.gguf"
    write_text_encoder(
        path, weights, architecture, setup=lambda writer: add_vocabulary(writer, model, "bpe", 512)
    )
    reference, packed = load_dense(comfy, dense, "lumina2"), load_packed(path, "lumina2")
    assert packed.tokenize(PROMPT) == reference.tokenize(PROMPT)
    wanted = encode(reference)
    assert wanted.std() > 0.01
    torch.testing.assert_close(encode(packed), wanted, rtol=1e-4, atol=1e-4)


def kinds() -> Any:
    from snug.nodes.adapter import text_encoder_kinds

    return text_encoder_kinds


def image_prompt(clip: Any) -> torch.Tensor:
    image = torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(1))
    return encode(clip, "make it blue", images=[image])


@pytest.mark.parametrize("choice", ["auto", "named"])
def test_vision(choice: str, make: Any, comfy: Any, tmp_path: Path) -> None:
    """An image in the prompt gives the same conditioning, with the vision part found or chosen."""
    path, dense, weights = make("QWEN25_7B")
    vision = {n.removeprefix("visual."): t for n, t in weights.items() if n.startswith("visual.")}
    part = write_mmproj(tmp_path / "encoder-mmproj-F16.gguf", vision, "qwen2.5vl_merger")
    wanted = image_prompt(load_dense(comfy, dense, "qwen_image"))
    clip = load_packed(path, "qwen_image", **({} if choice == "auto" else {"mmproj": str(part)}))
    torch.testing.assert_close(image_prompt(clip), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_images_without_a_vision_part_are_refused(choice: str, make: Any) -> None:
    from snug.quant_backends.core.errors import SnugError

    path, _, _ = make("QWEN25_7B")
    clip = load_packed(path, "qwen_image", mmproj=choice)
    assert encode(clip).isfinite().all()
    with pytest.raises(SnugError, match="loaded without its vision part.*mmproj"):
        image_prompt(clip)
