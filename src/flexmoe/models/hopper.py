"""The kernels for Hopper GPUs that a model uses. Enters: a GPU and a model's shapes. Leaves: kernels, or none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from flexmoe.config.model import ModelConfig
from flexmoe.errors import FlexMoEError
from flexmoe.kernels.hopper.attention import PromptAttention, why_no_attention
from flexmoe.kernels.hopper.products import ExpertProducts, why_no_products

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HopperKernels:
    """None: Triton's kernels are used instead."""

    attention: PromptAttention | None = None
    products: ExpertProducts | None = None

    def for_decodes(self) -> HopperKernels:
        """Those of decode steps: products of their own, since launches of one object must follow each other."""
        return HopperKernels(products=self.products and self.products.another())

    @property
    def words(self) -> str:
        """By what prompts are computed, for people."""
        served = {"attention": self.attention, "experts": self.products}
        names = ", ".join(name for name, kernel in served.items() if kernel is not None)
        return f"Triton, CUDA for Hopper ({names})" if names else "Triton"


def hopper_kernels(device: torch.device, config: ModelConfig, dtype: torch.dtype) -> HopperKernels:
    """Those that serve a model on a device, compiled if the user's cache has not got them. config: of this rank.

    Where they cannot be compiled or loaded, a warning says so, and there are none.
    """
    if device.type != "cuda":
        return HopperKernels()
    try:
        attends, multiplies = served(torch.cuda.get_device_capability(device), config, dtype)
        return HopperKernels(
            PromptAttention(device, dtype) if attends else None, ExpertProducts(device, dtype) if multiplies else None
        )
    # Whatever NVRTC or its bindings lack here.
    except (FlexMoEError, AttributeError, ImportError, OSError, RuntimeError) as error:
        _log.warning("the kernels for Hopper GPUs cannot be used, Triton's are in their place: %s", error)
        return HopperKernels()


def imagined_kernels(attends: bool, multiplies: bool) -> HopperKernels:
    """In the place of those of a GPU that is not here: what they launch is no concern of whoever compiles for it."""
    attention: Any = _Nothing() if attends else None
    products: Any = _Nothing() if multiplies else None
    return HopperKernels(attention, products)


def served(capability: tuple[int, int], config: ModelConfig, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether they compute attention, and experts' products, on a GPU of that capability."""
    reasons = {"attention of prompts": why_no_attention(capability, dtype, config.attention.head_dim)}
    if (moe := config.moe) is not None:
        reason = why_no_products(capability, dtype, moe.num_experts, config.hidden_size, moe.expert_width)
        reasons["experts with many rows"] = reason
    for what, reason in reasons.items():
        if reason:
            _log.info("%s: by Triton's kernels, not by those for Hopper GPUs: %s", what, reason)
    attends, *multiplies = (not reason for reason in reasons.values())
    return attends, any(multiplies)


class _Nothing:
    """Has the faces of both."""

    rows = PromptAttention.rows

    def __call__(self, *_: Any, **__: Any) -> None:
        """Launches nothing."""

    gate_up = down = __call__

    def another(self) -> _Nothing:
        """Nothing needs no second one."""
        return self
