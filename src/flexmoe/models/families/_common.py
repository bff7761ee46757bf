"""What the families share: reading attention and the fields every decoder has. Enters: a Reader. Leaves: configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexmoe.config.model import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, QKNorm
from flexmoe.errors import ConfigError
from flexmoe.models.families._reader import Reader
from flexmoe.models.families._rope import read_rope

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Family:
    """One page of data. defaults: of the family's transformers config class, for keys that config.json lacks.

    read: config.json to ModelConfig. names: checkpoint tensor -> ours, see `_names`.
    """

    model_type: str
    architecture: str
    read: Callable[[Reader], ModelConfig]
    names: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention as read, and the context length its rotary embedding allows."""

    config: AttentionConfig
    max_position: int


def read_attention(
    reader: Reader,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: QKNorm = "none",
    clip_qkv: float | None = None,
) -> Attention:
    """Heads and rotary embedding. A null or absent num_key_value_heads means as many as query heads."""
    hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    kv_heads = heads if reader.get(int, "num_key_value_heads") is None else reader.count("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"{reader.where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}."
        )
    rope, max_position = read_rope(reader, _head_dim(reader, hidden, heads), reader.count("max_position_embeddings"))
    config = AttentionConfig(heads, kv_heads, rope.rotary_dim, rope, qkv_bias, out_bias, qk_norm, clip_qkv)
    return Attention(config, max_position)


def _head_dim(reader: Reader, hidden: int, heads: int) -> int:
    if reader.get(int, "head_dim") is not None:
        head_dim = reader.count("head_dim")
    elif hidden % heads:
        raise ConfigError(f"{reader.where}: num_attention_heads={heads} does not divide hidden_size={hidden}.")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise ConfigError(f"{reader.where}: head_dim={head_dim} is odd; rotary embeddings need an even one.")
    return head_dim


def read_moe(reader: Reader, *, expert_width: str, renormalize: bool, shared_width: int = 0) -> MoEConfig:
    """Experts. transformers spells their number num_experts or num_local_experts, by family and version."""
    experts = reader.count("num_experts", "num_local_experts")
    reader.skip("num_experts", "num_local_experts")
    top_k = reader.count("num_experts_per_tok")
    if top_k > experts:
        raise ConfigError(f"{reader.where}: num_experts_per_tok={top_k} is above the number of experts, {experts}.")
    width = reader.count(expert_width)
    return MoEConfig(experts, top_k, width, renormalize, shared_width, shared_gate=shared_width > 0)


def same_layers(reader: Reader, *, is_moe: bool, window: int | None = None) -> tuple[LayerConfig, ...]:
    """Layers that do not differ. A layer_types that says otherwise is refused."""
    count = reader.count("num_hidden_layers")
    kind = "full_attention" if window is None else "sliding_attention"
    reader.accept("layer_types", [kind] * count)
    return (LayerConfig(is_moe, window),) * count


def read_window(reader: Reader) -> int | None:
    """sliding_window, null for none. Each token sees that many latest positions, itself included."""
    return None if reader.get(int, "sliding_window") is None else reader.count("sliding_window")


def decoder(
    reader: Reader,
    attention: Attention,
    layers: tuple[LayerConfig, ...],
    *,
    moe: MoEConfig | None = None,
    dense_width: int = 0,
    dense_bias: bool = False,
) -> ModelConfig:
    """The fields every decoder has, joined with what the family has read."""
    if reader.get(str, "hidden_act") not in ("silu", "swish"):
        reader.unsupported("hidden_act", reader.get(str, "hidden_act"), "'silu'")
    eos = reader.integers("eos_token_id")
    return ModelConfig(
        family=reader.family,
        architecture="",
        vocab_size=reader.count("vocab_size"),
        hidden_size=reader.count("hidden_size"),
        dense_width=dense_width,
        attention=attention.config,
        moe=moe if any(layer.is_moe for layer in layers) else None,
        layers=layers,
        norm_eps=reader.positive("rms_norm_eps"),
        max_position=attention.max_position,
        tie_embeddings=reader.flag("tie_word_embeddings"),
        dense_bias=dense_bias,
        checkpoint_dtype=_dtype(reader),
        bos_token_id=next(iter(reader.integers("bos_token_id")), None),
        eos_token_ids=eos,
    )


def _dtype(reader: Reader) -> str:
    """`dtype`, or `torch_dtype` before transformers 5; some files say torch.bfloat16."""
    spelled = reader.get(str, "dtype") or reader.get(str, "torch_dtype") or "bfloat16"
    dtype = spelled.removeprefix("torch.")
    if dtype not in _DTYPES:
        reader.unsupported("dtype", spelled, ", ".join(_DTYPES))
    return dtype
