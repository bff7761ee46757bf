"""Packing: how a checkpoint holds weights of few bits. Enters: config.json. Leaves: it, checked, and stored shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flexmoe.errors import ConfigError, UnsupportedModelError

GROUP = 32  # columns with one scale in memory; as in kernels/cpu/vector.h
METHOD = "flexmoe"
SCALE = "_scale"  # behind a tensor's name: the tensor of its scales
KEY = "quantization_config"
_BITS = (8, 4)


@dataclass(frozen=True, slots=True)
class Packing:
    """bits: of projections and experts. group_size: columns that share a scale in the file, a multiple of GROUP."""

    bits: int
    group_size: int = GROUP

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ConfigError(f"{KEY}: bits={self.bits!r} is not one of 8, 4.")
        size = self.group_size
        if type(size) is not int or size < GROUP or size % GROUP:
            raise ConfigError(f"{KEY}: group_size={size!r} is not a positive multiple of {GROUP}; use {GROUP}.")

    @classmethod
    def read(cls, hf_config: Mapping[str, Any]) -> Packing | None:
        """What config.json says; None for a model of full weights. Raises UnsupportedModelError for others' methods."""
        found = hf_config.get(KEY)
        if not isinstance(found, Mapping) or not found:
            return None
        values = dict(found)
        method = values.pop("quant_method", None)
        if method != METHOD:
            raise UnsupportedModelError(
                f"config.json: {KEY} names the method {method!r}, whose weights are not read here; take the full "
                "model, with quantization='int8' or 'int4', or through `flexmoe quantize`."
            )
        if values.keys() != {"bits", "group_size"}:
            raise ConfigError(f"config.json: {KEY} has keys {sorted(values)}; it needs bits and group_size.")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {"quant_method": METHOD} | asdict(self)

    @property
    def quantization(self) -> str:
        """As `quantization` is given: "int8" or "int4"."""
        return f"int{self.bits}"

    def scale_columns(self, columns: int) -> int:
        """How many scales a row of so many weights has in the file."""
        return -(-columns // self.group_size)


def code_columns(columns: int, bits: int) -> int:
    """Bytes of the codes of a row of so many weights."""
    return columns if bits == 8 else -(-columns // GROUP) * GROUP // 2
