"""The decoder's parameters and the checkpoint tensors that fill them. Enters: ModelConfig. Leaves: names and shapes.

Letters: H hidden size, V vocabulary, F a feed-forward's or expert's width, E experts, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flexmoe.config.model import LayerConfig, ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the decoder, experts stacked first. parts: name and number of rows of each, in order."""

    name: str
    shape: Shape
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether the first dimension counts experts."""
        return len(self.shape) == 3


@dataclass(frozen=True, slots=True)
class Piece:
    """What one checkpoint tensor of `shape` fills: rows from `start` of `param`, of one `expert`, or of all (fused)."""

    param: str
    shape: Shape
    start: int = 0
    expert: int | None = None

    @property
    def fused(self) -> bool:
        """Whether the tensor holds all experts, [E, rows, columns]."""
        return len(self.shape) == 3


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of the decoder, in the order of computation."""
    return {parameter.name: parameter for parameter in _parameters(config)}


def tensors(config: ModelConfig, names: Mapping[str, str]) -> dict[str, Piece]:
    """Every tensor name that a checkpoint of this model may hold. `names`: the family's table, see `_names`.

    Several names may stand for equal pieces: alternatives, of which the first is the usual spelling.
    """
    known = parameters(config)
    found: dict[str, Piece] = {}
    for theirs, ours in names.items():
        target, _, part = ours.partition(":")
        for layer in range(config.num_layers if "{layer}" in theirs else 1):
            parameter = known.get(target.format(layer=layer))
            if parameter is not None:
                found |= _pieces(theirs.replace("{layer}", str(layer)), parameter, part)
    return found


def _pieces(theirs: str, parameter: Parameter, part: str) -> Iterator[tuple[str, Piece]]:
    if part == "experts":
        yield theirs, Piece(parameter.name, parameter.shape)
        return
    start, rows = _rows(parameter, part)
    if not parameter.stacked:
        yield theirs, Piece(parameter.name, (rows, *parameter.shape[1:]), start)
        return
    shape = (rows, *parameter.shape[2:])
    for expert in range(parameter.shape[0]):
        yield theirs.replace("{expert}", str(expert)), Piece(parameter.name, shape, start, expert)


def _rows(parameter: Parameter, part: str) -> tuple[int, int]:
    """First row and number of rows of a part (of all rows, if the parameter is not divided)."""
    start = 0
    for name, rows in parameter.parts:
        if name == part:
            return start, rows
        start += rows
    return 0, parameter.shape[1 if parameter.stacked else 0]


def _parameters(config: ModelConfig) -> Iterator[Parameter]:
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Parameter("embed_tokens.weight", (vocab, hidden))
    for i, layer in enumerate(config.layers):
        prefix = f"layers.{i}."
        for parameter in (*_attention(config), *_feed_forward(config, layer)):
            yield Parameter(prefix + parameter.name, parameter.shape, parameter.parts)
    yield Parameter("norm.weight", (hidden,))
    if not config.tie_embeddings:
        yield Parameter("lm_head.weight", (vocab, hidden))


def _attention(config: ModelConfig) -> Iterator[Parameter]:
    a, hidden = config.attention, config.hidden_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    parts = (("q", q), ("k", kv), ("v", kv))
    yield Parameter("input_norm.weight", (hidden,))
    yield Parameter("attention.qkv.weight", (q + 2 * kv, hidden), parts)
    if a.qkv_bias:
        yield Parameter("attention.qkv.bias", (q + 2 * kv,), parts)
    if a.qk_norm != "none":
        yield Parameter("attention.q_norm.weight", (a.head_dim if a.qk_norm == "head" else q,))
        yield Parameter("attention.k_norm.weight", (a.head_dim if a.qk_norm == "head" else kv,))
    yield Parameter("attention.out.weight", (hidden, q))
    if a.out_bias:
        yield Parameter("attention.out.bias", (hidden,))
    yield Parameter("mlp_norm.weight", (hidden,))


def _feed_forward(config: ModelConfig, layer: LayerConfig) -> Iterator[Parameter]:
    hidden, m = config.hidden_size, config.moe
    if not layer.is_moe or m is None:
        yield from _swiglu("mlp", hidden, config.dense_width, config.dense_bias)
        return
    width, parts = m.expert_width, (("gate", m.expert_width), ("up", m.expert_width))
    yield Parameter("moe.router.weight", (m.num_experts, hidden))
    yield Parameter("moe.experts.gate_up", (m.num_experts, 2 * width, hidden), parts)
    yield Parameter("moe.experts.down", (m.num_experts, hidden, width))
    if m.shared_width:
        yield from _swiglu("moe.shared", hidden, m.shared_width, bias=False)
    if m.shared_gate:
        yield Parameter("moe.shared_gate.weight", (1, hidden))


def _swiglu(name: str, hidden: int, width: int, bias: bool) -> Iterator[Parameter]:
    parts = (("gate", width), ("up", width))
    yield Parameter(f"{name}.gate_up.weight", (2 * width, hidden), parts)
    yield Parameter(f"{name}.down.weight", (hidden, width))
    if bias:
        yield Parameter(f"{name}.gate_up.bias", (2 * width,), parts)
        yield Parameter(f"{name}.down.bias", (hidden,))
