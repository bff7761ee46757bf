"""Which rows, columns and experts of each parameter a rank holds. Enters: a Shard. Leaves: Cuts. No torch.

Rows of a projection belong to heads or to a feed-forward's columns, so they are cut by head and by width, each part
(q, k, v; gate, up) for itself; the projection behind it is cut by columns alike. Norms, routers and the biases that
are added once to a sum are held whole. Of layers of other pipeline stages nothing is held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flexmoe.config.shard import Shard
from flexmoe.models import families
from flexmoe.models.families.layout import Parameter, Shape

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Cut:
    """Of a whole parameter: these rows, in order, and these columns (None: all), of these experts (None: no stack)."""

    rows: tuple[range, ...]
    columns: range | None = None
    slots: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.rows))

    def shape(self, whole: Shape) -> Shape:
        """The shape of what is held of a parameter of shape `whole`."""
        rest = whole[1:] if self.slots is None else whole[2:]
        if self.columns is not None:
            rest = (len(self.columns),)
        return (*(() if self.slots is None else (len(self.slots),)), self.num_rows, *rest)


def cuts(shard: Shard) -> dict[str, Cut]:
    """What the rank holds of each parameter, those of layers of other stages left out."""
    parameters, stage = families.parameters(shard.config).items(), shard.layers
    return {name: _cut(parameter, shard) for name, parameter in parameters if _is_on_stage(name, stage)}


def num_parameters(shard: Shard) -> int:
    """Parameters that the rank holds, replicas counted each time."""
    whole = families.parameters(shard.config)
    return sum(math.prod(cut.shape(whole[name].shape)) for name, cut in cuts(shard).items())


def _is_on_stage(name: str, stage: range) -> bool:
    layer = _LAYER.match(name)
    return layer is None or int(layer[1]) in stage


def _cut(parameter: Parameter, shard: Shard) -> Cut:
    layer = _LAYER.match(parameter.name)
    kind = parameter.name[layer.end() :] if layer else parameter.name
    slots = shard.slots(int(layer[1])) if layer and parameter.stacked else None
    rows = parameter.shape[1 if parameter.stacked else 0]
    if kind in _COLUMNS:
        return Cut((range(rows),), _COLUMNS[kind](shard), slots)
    if kind in _ROWS:
        return Cut(tuple(_part_rows(parameter, _ROWS[kind](shard))), None, slots)
    return Cut((range(rows),), None, slots)


def _part_rows(parameter: Parameter, held: Mapping[str, range]) -> Iterator[range]:
    """The rows that are held of each part, counted from the parameter's first row."""
    start = 0
    for name, rows in parameter.parts or (("", parameter.shape[0]),):
        yield range(start + held[name].start, start + held[name].stop)
        start += rows


def _of_heads(heads: range, shard: Shard) -> range:
    size = shard.config.attention.head_dim
    return range(heads.start * size, heads.stop * size)


def _qkv(shard: Shard) -> dict[str, range]:
    query, key = _of_heads(shard.heads, shard), _of_heads(shard.kv_heads, shard)
    return {"q": query, "k": key, "v": key}


def _head_norm(heads: Callable[[Shard], range]) -> Callable[[Shard], dict[str, range]]:
    """Rows of the norm of a projection: cut like it, or held whole where one norm serves all heads."""

    def rows(shard: Shard) -> dict[str, range]:
        a = shard.config.attention
        return {"": range(a.head_dim) if a.qk_norm == "head" else _of_heads(heads(shard), shard)}

    return rows


def _gate_up(width: Callable[[Shard], range]) -> Callable[[Shard], dict[str, range]]:
    return lambda shard: {"gate": width(shard), "up": width(shard)}


_ROWS: dict[str, Callable[[Shard], dict[str, range]]] = {
    "embed_tokens.weight": lambda shard: {"": shard.embedding},
    "lm_head.weight": lambda shard: {"": shard.head},
    "norm.weight": lambda shard: {"": shard.final_norm},
    "attention.qkv.weight": _qkv,
    "attention.qkv.bias": _qkv,
    "attention.q_norm.weight": _head_norm(lambda shard: shard.heads),
    "attention.k_norm.weight": _head_norm(lambda shard: shard.kv_heads),
    "mlp.gate_up.weight": _gate_up(lambda shard: shard.dense_width),
    "mlp.gate_up.bias": _gate_up(lambda shard: shard.dense_width),
    "moe.experts.gate_up": _gate_up(lambda shard: shard.expert_width),
    "moe.shared.gate_up.weight": _gate_up(lambda shard: shard.shared_width),
}
_COLUMNS: dict[str, Callable[[Shard], range]] = {
    "attention.out.weight": lambda shard: _of_heads(shard.heads, shard),
    "mlp.down.weight": lambda shard: shard.dense_width,
    "moe.experts.down": lambda shard: shard.expert_width,
    "moe.shared.down.weight": lambda shard: shard.shared_width,
}
