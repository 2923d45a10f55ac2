"""Layers of every family's blocks, by name: which of them gain from products in 8 bits."""

from __future__ import annotations

import pytest
from snug.quant_backends.quantization.fast_layers import reason_to_leave_out

FAST = """
    double_blocks.0.img_attn.qkv double_blocks.0.img_mlp.2 single_blocks.3.linear1 single_blocks.3.linear2
    double_blocks.0.img_attn_qkv joint_blocks.1.x_block.attn.qkv joint_blocks.1.x_block.mlp.fc1
    blocks.0.self_attn.k blocks.0.cross_attn.q blocks.0.cross_attn.o blocks.0.ffn.2
    transformer_blocks.0.attn.to_q transformer_blocks.0.attn1.to_v transformer_blocks.0.attn2.to_q
    transformer_blocks.0.img_mlp.net.0.proj layers.4.attention.qkv layers.4.feed_forward.w2
"""
MODULATION = """
    double_blocks.0.img_mod.lin single_blocks.1.modulation.lin joint_blocks.1.x_block.adaLN_modulation.1
    transformer_blocks.0.img_mod.1 layers.4.adaLN_modulation.0 input_blocks.1.0.emb_layers.1
"""
TEXT = """
    double_blocks.0.txt_attn.proj double_blocks.0.txt_mlp_fc1 joint_blocks.1.context_block.attn.qkv
    blocks.0.cross_attn.k blocks.0.cross_attn.v_img transformer_blocks.0.attn2.to_k
    transformer_blocks.0.attn.add_k_proj transformer_blocks.0.attn.to_add_out transformer_blocks.0.txt_mlp.net.2
    context_refiner.0.attention.qkv txt_in.individual_token_refiner.blocks.0.mlp.2
"""


@pytest.mark.parametrize(("names", "reason"), [(FAST, None), (MODULATION, "modulation"), (TEXT, "text")])
def test_by_name(names: str, reason: str | None) -> None:
    assert {name: reason_to_leave_out(name) for name in names.split()} == dict.fromkeys(names.split(), reason)
