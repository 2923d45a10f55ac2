"""The text encoder of the model that draws digits: a T5 of one layer whose weights are written down, not trained.

ComfyUI's T5 tokenizer makes two tokens of a digit: its own and the end of the text; of "0" three, and of an empty text
the end alone. For digits the encoder gives the vectors of `prompts`, for an empty text the second of them, scaled to a
root mean square of 1 by T5's last norm. A digit's first vector is its row of the embedding. Attention moves which
digit it was (one number for each, out of `v`) to the end of the text, and `o` makes the second vector of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from .prompts import CLASSES, NOTHING, WIDTH, prompts

# Of ComfyUI's T5 tokenizer: what it makes of "0" to "9", the end of a text, and what stands before a "0".
DIGIT_TOKENS = (632, 209, 204, 220, 314, 305, 431, 489, 505, 668)
END, SPACE = 1, 3
# Of CLIPLoader: one of those that take a T5 alone and fill no prompt up to hundreds of tokens.
TEXT_ENCODER_TYPE = "pixart"
ROWS = max(DIGIT_TOKENS) + 4  # whole groups of 32, as blocks of many formats are
INNER = 32
# What is at the end of a text without a digit, beside what attention brings there.
FAINT = 1 / 64
# How T5 numbers distances: this token, the one before and the one after; of 32 numbers the upper half lies after.
HERE, BEFORE, AFTER, DISTANCES = 0, 1, 17, 32


def make_digits_text_encoder(path: str | os.PathLike[str]) -> Path:
    """Writes it with the names of a T5, float16, 7 MB. Needs nodes that let ComfyUI take so small a one."""
    vectors = prompts(range(CLASSES + 1))
    vectors = vectors / vectors.square().mean(dim=-1, keepdim=True).sqrt()
    table = torch.zeros(ROWS, WIDTH)
    table[list(DIGIT_TOKENS)] = vectors[:CLASSES, 0]
    table[SPACE] = FAINT * vectors[NOTHING, 0]
    table[END] = FAINT * vectors[NOTHING, 1]  # alone it stands for nothing better than the first one does
    value, out = torch.zeros(INNER, WIDTH), torch.zeros(WIDTH, INNER)
    # 1 for this digit, 0 for the others, for what comes before a "0" and for the end.
    known = torch.cat([vectors[:, 0], vectors[NOTHING:, 1]])
    value[:CLASSES] = torch.linalg.pinv(known.T.double())[:CLASSES].float()
    out[:, :CLASSES] = vectors[:CLASSES, 1].T
    bias = torch.full((DISTANCES, 1), -40.0)
    bias[[HERE, BEFORE, AFTER], 0] = torch.tensor([0.0, 20.0, 40.0])
    nothing = torch.zeros(INNER, WIDTH)
    block = "encoder.block.0.layer."
    tensors = {
        "shared.weight": table,
        f"{block}0.SelfAttention.q.weight": nothing,
        f"{block}0.SelfAttention.k.weight": nothing.clone(),
        f"{block}0.SelfAttention.v.weight": value,
        f"{block}0.SelfAttention.o.weight": out,
        f"{block}0.SelfAttention.relative_attention_bias.weight": bias,
        f"{block}0.layer_norm.weight": torch.ones(WIDTH),
        f"{block}1.DenseReluDense.wi_0.weight": nothing.clone(),
        f"{block}1.DenseReluDense.wi_1.weight": nothing.clone(),
        f"{block}1.DenseReluDense.wo.weight": torch.zeros(WIDTH, INNER),
        f"{block}1.layer_norm.weight": torch.ones(WIDTH),
        "encoder.final_layer_norm.weight": torch.ones(WIDTH),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path
