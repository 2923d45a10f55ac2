"""Text encoders of reduced size: ComfyUI's own classes with other configurations, random weights, tiny tokenizers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_encoder_files import snap

PROMPT = "a red fox under the moon, 水彩画"


def detect_as(comfy: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """ComfyUI's detection, which looks at full sizes, takes every file but CLIP-L for one of this kind."""
    original = comfy.sd.detect_te_model
    known = comfy.sd.TEModel[kind]

    def detect(tensors: Any) -> Any:
        return known if "text_model.final_layer_norm.weight" not in tensors else original(tensors)

    monkeypatch.setattr(comfy.sd, "detect_te_model", detect)


def sizes(hidden: int = 128, layers: int = 4, heads: tuple[int, int] = (8, 4)) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }


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
    """What the text encoder's own file holds; the output layer without the name that ComfyUI nests it in."""
    return {
        name.replace("model.lm_head.", "lm_head."): tensor
        for name, tensor in weights.items()
        if not name.startswith("visual.")
    }


def load_dense(comfy: Any, path: Path, clip_type: str) -> Any:
    kind = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    return comfy.sd.load_clip([str(path)], clip_type=kind, model_options={"dtype": torch.float32})


def load_packed(path: Path, clip_type: str, **options: Any) -> Any:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    return load_text_encoders([str(path)], clip_type, **options)


def encode(clip: Any, prompt: str = PROMPT, **options: Any) -> torch.Tensor:
    """HiDream keeps LLaMA's output beside the conditioning of T5."""
    found = clip.encode_from_tokens(clip.tokenize(prompt, **options), return_dict=True)
    return found.get("conditioning_llama3", found["cond"])


class SmallCLIP:
    """ComfyUI's CLIP text model, CLIP-L or CLIP-G by its number of layers, with a narrow configuration."""

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}

    def __init__(self, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import comfy.clip_model

        build = comfy.clip_model.CLIPTextModel.__init__
        self.comfy = comfy

        def narrow(model: Any, config: dict[str, Any], *args: Any) -> None:
            build(model, {**config, **self.sizes}, *args)

        monkeypatch.setattr(comfy.clip_model.CLIPTextModel, "__init__", narrow)

    def weights(self, config: str, seed: int = 0) -> dict[str, torch.Tensor]:
        """config: name of ComfyUI's JSON file. Matrices of Linear layers lie on the grid of Q8_0."""
        settings = json.loads((Path(self.comfy.sd.__file__).parent / config).read_text())
        module = self.comfy.clip_model.CLIPTextModel(
            settings, torch.float32, "meta", self.comfy.ops.manual_cast
        )
        return random_weights(module, "Q8_0", seed)


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


def with_tokenizer(weights: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """A dense file as ComfyUI's own, with the tokenizer in a tensor."""
    proto = torch.frombuffer(bytearray(model.serialized_model_proto()), dtype=torch.uint8)
    return {**weights, "spiece_model": proto}
