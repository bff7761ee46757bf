"""The dense four: Llama, Mistral, Qwen2 and Qwen3.

Llama may have biases in attention (attention_bias) and feed-forward (mlp_bias) and has no window. Mistral has one
window for all layers (4096 if config.json does not say). Qwen2 always has q/k/v biases; Qwen3 has q/k norms over each
head. The Qwens' window is in the layers from max_window_layers on, or those that layer_types names.
"""

from __future__ import annotations

from flexmoe.config.model import LayerConfig, ModelConfig, QKNorm
from flexmoe.models.families._common import Family, decoder, read_attention, read_window, same_layers
from flexmoe.models.families._names import ATTENTION, DENSE
from flexmoe.models.families._reader import Reader
from flexmoe.models.families._windows import read_windows


def _read_llama(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias")
    return decoder(
        reader,
        read_attention(reader, qkv_bias=bias, out_bias=bias),
        same_layers(reader, is_moe=False),
        dense_width=reader.count("intermediate_size"),
        dense_bias=reader.flag("mlp_bias"),
    )


def _read_mistral(reader: Reader) -> ModelConfig:
    layers = same_layers(reader, is_moe=False, window=read_window(reader))
    return decoder(reader, read_attention(reader), layers, dense_width=reader.count("intermediate_size"))


def _read_qwen2(reader: Reader) -> ModelConfig:
    reader.accept("qkv_bias", True)
    return _read_qwen(reader, qkv_bias=True, out_bias=False, qk_norm="none")


def _read_qwen3(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias")
    return _read_qwen(reader, qkv_bias=bias, out_bias=bias, qk_norm="head")


def _read_qwen(reader: Reader, *, qkv_bias: bool, out_bias: bool, qk_norm: QKNorm) -> ModelConfig:
    first = reader.get(int, "max_window_layers") or 0
    windows = read_windows(reader, lambda i: i >= first)
    return decoder(
        reader,
        read_attention(reader, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm),
        tuple(LayerConfig(False, window) for window in windows),
        dense_width=reader.count("intermediate_size"),
    )


_NAMES = {**ATTENTION, **DENSE}
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
_LLAMA = {**_DEFAULTS, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {**_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32,
         "sliding_window": 4096, "max_window_layers": 28}  # fmt: skip

FAMILIES = (
    Family("llama", "LlamaForCausalLM", _read_llama, _NAMES, {**_LLAMA, "max_position_embeddings": 2048}),
    Family(
        "mistral",
        "MistralForCausalLM",
        _read_mistral,
        _NAMES,
        {**_LLAMA, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _NAMES, _QWEN),
    Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _NAMES, {**_QWEN, "head_dim": 128}),
)
