"""HunyuanDiT's BERT and mT5 in files of any kind.

ComfyUI itself takes them out of a checkpoint only; the reference is made of its classes.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized_files import dense_tensors, quantize_tensors
from safetensors.torch import save_file
from small_text_encoders import PROMPT, SmallT5, random_weights, with_tokenizer
from snug.quant_backends.core.errors import SnugError
from text_encoder_files import write_text_encoder
from vocabularies import sentencepiece_model, write_sentencepiece

ROWS = 6200
Weights = dict[str, torch.Tensor]


@pytest.fixture
def pair(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Weights, Weights]:
    """BERT and mT5, with its tokenizer as ComfyUI saves it; its classes are made small."""
    from comfy.text_encoders import hydit
    from snug.nodes.adapter import text_encoder_kinds

    folder, build = Path(hydit.__file__).parent, hydit.BertModel
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    monkeypatch.setattr(hydit, "BertModel", lambda config, *args: build({**config, **small}, *args))
    t5 = SmallT5(monkeypatch)
    t5.vocab_size = ROWS
    meta = (torch.float32, "meta", comfy.ops.manual_cast)
    make = {"hydit_clip.json": hydit.BertModel, "mt5_config_xl.json": t5}
    bert, mt5 = (
        random_weights(model(json.loads((folder / name).read_text()), *meta), "Q8_0")
        for name, model in make.items()
    )
    monkeypatch.setattr(text_encoder_kinds, "MT5_ROWS", ROWS)
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda tensors: comfy.sd.TEModel.T5_XL)
    return bert, with_tokenizer(mt5, sentencepiece_model("unigram"))


def reference(comfy: Any, bert: Weights, mt5: Weights) -> Any:
    from comfy.text_encoders import hydit

    clip = comfy.sd.CLIP(
        SimpleNamespace(clip=hydit.HyditModel, tokenizer=hydit.HyditTokenizer, params={}),
        tokenizer_data={"mt5xl.spiece_model": mt5["spiece_model"]},
        model_options={"dtype": torch.float32},
    )
    for weights in (bert, {name: value for name, value in mt5.items() if name != "spiece_model"}):
        clip.load_sd(weights)
    return clip


def outputs(clip: Any) -> list[torch.Tensor]:
    found = clip.encode_from_tokens(clip.tokenize(PROMPT), return_dict=True)
    tensors = [found[key] for key in ("cond", "conditioning_mt5xl")]
    assert all(tensor.isfinite().all() and tensor.std() > 0.01 for tensor in tensors)
    return tensors


def load(*paths: Path, **options: Any) -> Any:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    return load_text_encoders(list(map(str, paths)), "hunyuan_dit", **options)


def written(folder: Path, weights: Weights, name: str) -> Path:
    save_file(weights, folder / name)
    return folder / name


@pytest.mark.parametrize("kind", ["plain", "GGUF", "nf4", "fp8"])
def test_pair(kind: str, pair: tuple[Weights, Weights], comfy: Any, tmp_path: Path) -> None:
    bert, mt5 = pair
    paths = [written(tmp_path, bert, "bert.safetensors"), written(tmp_path, mt5, "mt5.safetensors")]
    twins: list[Weights] = [bert, mt5]
    if kind == "GGUF":
        model = sentencepiece_model("unigram")
        setup = functools.partial(write_sentencepiece, model=model, kind="unigram", rows=ROWS)
        tensors = {name: value for name, value in mt5.items() if name != "spiece_model"}
        paths[1] = write_text_encoder(tmp_path / "mt5.gguf", tensors, "t5encoder", setup=setup)
    elif kind != "plain":
        for number, weights in enumerate(pair):
            stored, metadata = quantize_tensors(weights, kind)
            paths[number] = tmp_path / f"{kind}-{number}.safetensors"
            save_file({n: value.contiguous() for n, value in stored.items()}, paths[number], metadata)
            twins[number] = dense_tensors(paths[number]) | {
                n: weights[n] for n in ("spiece_model",) if n in weights
            }
    wanted = outputs(reference(comfy, *twins))
    for clip in (load(*paths), load(*reversed(paths))):
        for found, target in zip(outputs(clip), wanted, strict=True):
            if kind in ("plain", "GGUF"):
                assert torch.equal(found, target)
            else:
                torch.testing.assert_close(found, target, rtol=1e-3, atol=1e-3)


def test_quantize_save_and_load(
    pair: tuple[Weights, Weights], comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    clip = quantize_clip(reference(comfy, *pair), QuantizeSettings("bitsandbytes NF4"))[0]
    paths = save_text_encoders(clip, SaveSettings("hydit"))
    assert [path.name.partition("_0")[0] for path in paths] == ["hydit_hydit_clip", "hydit_mt5xl"]
    assert all(map(torch.equal, outputs(load(*paths)), outputs(clip)))


def test_refused(pair: tuple[Weights, Weights], comfy: Any, tmp_path: Path) -> None:
    bert, mt5 = pair
    first = written(tmp_path, bert, "bert.safetensors")
    second = written(tmp_path, mt5, "mt5.safetensors")
    for path, message in (
        (first, "this is HunyuanDiT's BERT, which is used beside mT5-XL; choose both, and type hunyuan_dit"),
        (second, "this is mT5-XL, which is used beside HunyuanDiT's BERT"),
    ):
        with pytest.raises(SnugError, match=message):
            load(path)
    mt5.pop("spiece_model")
    with pytest.raises(SnugError, match="mT5 comes without its tokenizer"):
        load(first, written(tmp_path, mt5, "without.safetensors"))
