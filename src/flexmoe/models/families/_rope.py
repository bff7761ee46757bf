"""Rotary embeddings in config.json, both spellings. Enters: a Reader. Leaves: RopeConfig and the context it allows.

transformers 5 writes `rope_parameters` with theta inside; before, there were `rope_theta` and `rope_scaling`, whose
`rope_type` was once called `type`. As there, a non-empty `rope_scaling` wins, and a theta inside wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexmoe.config.model import RopeConfig, RopeKind
from flexmoe.errors import ConfigError
from flexmoe.models.families._reader import Reader

# What each kind reads beside theta. A field of another kind is without effect, as in transformers.
_FIELDS: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_WITHOUT_EFFECT = ("original_max_position_embeddings", "finetuned")


def read_rope(reader: Reader, head_dim: int, max_position: int) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the context length it reaches from config.json's max_position_embeddings.

    linear and yarn stretch a context of `max_position` (yarn: of the original length) by their factor. dynamic does
    not: past `max_position` its angles depend on the length of the whole sequence, so that keys already in the cache
    would have to be rotated anew at each token, which transformers does not do either. Up to there it is exact.
    Errors: UnsupportedModelError for another kind or option, ConfigError for a missing or malformed one.
    """
    rope = _object(reader)
    kind = _kind(rope)
    theta = rope.positive("rope_theta") if rope.get(float, "rope_theta") else reader.positive("rope_theta")
    reader.skip("rope_theta")
    rope.accept("partial_rotary_factor", 1)
    rope.skip(*_WITHOUT_EFFECT, *(name for names in _FIELDS.values() for name in names))
    original = _original_length(reader, rope, kind, max_position)
    config = RopeConfig(theta=theta, rotary_dim=head_dim, kind=kind, original_max_position=original,
                        **_options(rope, kind, max_position, original))  # fmt: skip
    _refuse_rest(rope)
    return config, _reach(config, max_position)


def _object(reader: Reader) -> Reader:
    scaling = reader.get(dict, "rope_scaling")
    parameters = reader.get(dict, "rope_parameters")
    name = "rope_scaling" if scaling else "rope_parameters"
    return Reader(scaling or parameters or {}, {}, reader.family, f"{reader.where}: {name}")


def _kind(rope: Reader) -> RopeKind:
    spelled = rope.get(str, "rope_type") or rope.get(str, "type") or "default"
    rope.skip("type")
    for kind in _FIELDS:
        if kind == spelled:
            return kind
    return rope.unsupported("rope_type", spelled, ", ".join(_FIELDS))


def _original_length(reader: Reader, rope: Reader, kind: RopeKind, max_position: int) -> int | None:
    """The context before stretching. At the top level (Phi-3's way) it wins over the one inside."""
    top = reader.get(int, "original_max_position_embeddings")
    if kind == "dynamic":
        return max_position
    if kind in ("yarn", "llama3"):
        inside = rope.get(int, "original_max_position_embeddings")
        length = top or inside or max_position
        if length < 1:
            raise ConfigError(f"{rope.where}: original_max_position_embeddings={length} is not a positive integer.")
        return length
    return None


def _options(rope: Reader, kind: RopeKind, max_position: int, original: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in _FIELDS[kind]:
        value = rope.get(bool, name) if name == "truncate" else rope.get(float, name)
        if value is not None:
            options[name] = value
    if kind == "yarn":
        options.setdefault("factor", max_position / (original or max_position))
        # transformers treats a zero here as absent.
        options = {name: value for name, value in options.items() if value or not name.startswith("beta_")}
    required = ("factor",) if kind in ("linear", "dynamic") else _FIELDS[kind] if kind == "llama3" else ()
    for name in required:
        rope.positive(name)
    if options.get("factor", 1.0) <= 0:
        raise ConfigError(f"{rope.where}: factor={options['factor']:g} is not above 0.")
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise ConfigError(
            f"{rope.where}: high_freq_factor={options['high_freq_factor']:g} is not above "
            f"low_freq_factor={options['low_freq_factor']:g}."
        )
    return options


def _refuse_rest(rope: Reader) -> None:
    """An option of a kind we do not have (mrope_section, short_factor, one set per layer type) changes the angles."""
    for name, value in rope.unread().items():
        rope.unsupported(name, value, "no such option")


def _reach(rope: RopeConfig, max_position: int) -> int:
    if rope.kind == "linear":
        return int(max_position * rope.factor)
    if rope.kind == "yarn" and rope.original_max_position is not None:
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position
