"""Names of tensors in checkpoints and their place in ours, as tables: data only.

Left, the name in the checkpoint; `{layer}` and `{expert}` count. Right, our parameter and, after a colon, the part
of its rows that the tensor fills: qkv holds q, k and v one after the other, gate_up the gate's rows before the up's.
A fused tensor of all experts fills `experts`. Where two names on the left mean the same, the first one is the name
that transformers 4 and save_pretrained of 5 write, and the one that errors use.
"""

from __future__ import annotations

from collections.abc import Mapping

_LAYER = "model.layers.{layer}."
_OURS = "layers.{layer}."


def _in_layer(names: Mapping[str, str]) -> dict[str, str]:
    return {_LAYER + theirs: _OURS + ours for theirs, ours in names.items()}


ATTENTION = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    **_in_layer(
        {
            "input_layernorm.weight": "input_norm.weight",
            "post_attention_layernorm.weight": "mlp_norm.weight",
            "self_attn.q_proj.weight": "attention.qkv.weight:q",
            "self_attn.k_proj.weight": "attention.qkv.weight:k",
            "self_attn.v_proj.weight": "attention.qkv.weight:v",
            "self_attn.o_proj.weight": "attention.out.weight",
            "self_attn.q_proj.bias": "attention.qkv.bias:q",
            "self_attn.k_proj.bias": "attention.qkv.bias:k",
            "self_attn.v_proj.bias": "attention.qkv.bias:v",
            "self_attn.o_proj.bias": "attention.out.bias",
            "self_attn.q_norm.weight": "attention.q_norm.weight",
            "self_attn.k_norm.weight": "attention.k_norm.weight",
        }
    ),
}

DENSE = _in_layer(
    {
        "mlp.gate_proj.weight": "mlp.gate_up.weight:gate",
        "mlp.up_proj.weight": "mlp.gate_up.weight:up",
        "mlp.down_proj.weight": "mlp.down.weight",
        "mlp.gate_proj.bias": "mlp.gate_up.bias:gate",
        "mlp.up_proj.bias": "mlp.gate_up.bias:up",
        "mlp.down_proj.bias": "mlp.down.bias",
    }
)

EXPERTS = _in_layer(
    {
        "mlp.gate.weight": "moe.router.weight",
        "mlp.experts.{expert}.gate_proj.weight": "moe.experts.gate_up:gate",
        "mlp.experts.{expert}.up_proj.weight": "moe.experts.gate_up:up",
        "mlp.experts.{expert}.down_proj.weight": "moe.experts.down",
        "mlp.experts.gate_up_proj": "moe.experts.gate_up:experts",
        "mlp.experts.down_proj": "moe.experts.down:experts",
    }
)

SHARED_EXPERT = _in_layer(
    {
        "mlp.shared_expert.gate_proj.weight": "moe.shared.gate_up.weight:gate",
        "mlp.shared_expert.up_proj.weight": "moe.shared.gate_up.weight:up",
        "mlp.shared_expert.down_proj.weight": "moe.shared.down.weight",
        "mlp.shared_expert_gate.weight": "moe.shared_gate.weight",
    }
)

MIXTRAL_EXPERTS = {
    **_in_layer(
        {
            "block_sparse_moe.gate.weight": "moe.router.weight",
            "block_sparse_moe.experts.{expert}.w1.weight": "moe.experts.gate_up:gate",
            "block_sparse_moe.experts.{expert}.w3.weight": "moe.experts.gate_up:up",
            "block_sparse_moe.experts.{expert}.w2.weight": "moe.experts.down",
            "mlp.experts.{expert}.w1.weight": "moe.experts.gate_up:gate",
            "mlp.experts.{expert}.w3.weight": "moe.experts.gate_up:up",
            "mlp.experts.{expert}.w2.weight": "moe.experts.down",
        }
    ),
    **EXPERTS,
}
