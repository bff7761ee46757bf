"""Sliding windows of the Qwen families, which have a switch and a rule for layers. Enters: a Reader."""

from __future__ import annotations

from collections.abc import Callable

from flexmoe.errors import ConfigError
from flexmoe.models.families._reader import Reader

_KINDS = ("full_attention", "sliding_attention")


def read_switched_window(reader: Reader) -> int | None:
    """sliding_window if use_sliding_window is on, else None whatever its value (files carry 4096, 0 or null)."""
    reader.skip("sliding_window")
    if not reader.flag("use_sliding_window") or reader.get(int, "sliding_window") is None:
        return None
    return reader.count("sliding_window")


def read_windows(reader: Reader, by_rule: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer: those `layer_types` names, or without it those of the family's rule.

    Errors: ConfigError if layer_types names a window and there is none, or has another length than the model.
    """
    count, window = reader.count("num_hidden_layers"), read_switched_window(reader)
    kinds = reader.get(list, "layer_types")
    if kinds is None:
        return tuple(window if by_rule(i) else None for i in range(count))
    if len(kinds) != count:
        raise ConfigError(f"{reader.where}: layer_types has {len(kinds)} entries for num_hidden_layers={count}.")
    for kind in kinds:
        if kind not in _KINDS:
            reader.unsupported("layer_types", kind, " or ".join(_KINDS))
    if window is None and "sliding_attention" in kinds:
        raise ConfigError(
            f"{reader.where}: layer_types asks for sliding_attention, but use_sliding_window is off or "
            "sliding_window is null."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
