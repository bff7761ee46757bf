"""NativeDecoder: the decoder in the C kernels, for decodes and, where they are the faster way, for prompts.

Enters: a loaded Decoder, whose weights it reads where they are. Leaves: the same numbers, without Python between the
operations. `kernels/cpu/decode.c` says how.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flexmoe.config.model import ModelConfig
from flexmoe.kernels.cpu import levels, library
from flexmoe.kernels.cpu.decode import Activations, DecodeModel, LayerWeights, OuterWeights, PagedRows, Part, supports
from flexmoe.kernels.cpu.screen import MOST_COLUMNS, Screen
from flexmoe.kernels.quantize import QuantizedMatrix, Weights
from flexmoe.layers.attention import Attention
from flexmoe.layers.embedding import Embedding
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.layers.large_pages import move_to_large_pages
from flexmoe.layers.linear import Linear
from flexmoe.layers.mlp import GatedMLP
from flexmoe.layers.norm import RMSNorm
from flexmoe.moe.block import MoEBlock
from flexmoe.moe.dispatch import LocalDispatcher

# Multiply-adds a layer from which torch's matrix products win: they use the processor's tile units, at the price of
# Python between them. Measured crossings: 16 rows of 12 M weights a layer in bf16, beyond 32 rows in fp32.
_WORTH_TORCH = {torch.bfloat16: 200e6, torch.float32: 400e6}
_LEAST_ROWS, _MOST_ROWS = 4, 64
_ANY_ROWS = 1024  # of decodes, where C is the faster way for prompts as well
PROMPT_ROWS = 512  # of one call: more would read weights more seldom, and need more memory
_QK_NORM = {"none": 0, "head": 1, "full": 2}


def why_not_native(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, backend: str, isa: str = "auto"
) -> str:
    """Why the C kernels for this instruction set cannot decode this model, or "" if they can."""
    if device.type != "cpu" or backend != "cpu":
        return f"device {device.type} with expert backend {backend}"
    if not supports(dtype, config.attention.head_dim):
        return f"dtype {dtype} with head_dim {config.attention.head_dim}"
    return library.load(isa).reason


def takes_prompts(dtype: torch.dtype, isa: str = "auto", *, quantized: bool = False) -> bool:
    """Whether the C kernels are the faster way for prompts, too.

    They are in bf16 where they have bf16 units and oneDNN has no tile units (AMX), and for weights that torch would
    first widen. In fp32 that differs between processors, and prompts stay with torch.
    """
    native = library.load(isa).library
    assert native is not None, "ask why_not_native() first"
    if "amx_tile" in levels.features():
        return False
    return quantized or (dtype is torch.bfloat16 and bool(native.fm_bf16_units()))


def most_rows(config: ModelConfig, dtype: torch.dtype, *, quantized: bool = False, prompts: bool = False) -> int:
    """Rows of a step of decodes up to which the C kernels are the faster way. prompts: they are for these as well."""
    if prompts:
        return _ANY_ROWS
    if quantized:
        return _MOST_ROWS
    weights = config.num_active_parameters() - config.vocab_size * config.hidden_size
    rows = _WORTH_TORCH[dtype] / (weights / config.num_layers)
    return int(min(max(rows, _LEAST_ROWS), _MOST_ROWS))


class NativeDecoder:
    """A whole decoder in C, from token ids to logits; its weights live as long as this does.

    max_rows: decodes of a step that it should be given at most. prompts: whether it should be given these.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], outer: OuterWeights, threads: int, max_rows: int, isa: str = "auto",
        *, prompts: bool = False,
    ) -> None:  # fmt: skip
        self.max_rows, self.prompts = max_rows, prompts
        self._model = DecodeModel(layers, outer, threads, isa)
        self._screened = outer.screen is not None
        self._moe_layers = ["router" in layer.tensors for layer in layers]
        self._cache: KVCache | None = None

    def __call__(self, rows: PagedRows, cache: KVCache, probe: Probe | None = None, *, best: bool = False) -> Tensor:
        """Logits fp32 [N, V] of the rows that sample; writes all rows' keys and values into the cache.

        best: only the largest logit of each row is wanted; others may be -inf. Of prompts, whose activations are
        rounded, all are computed.
        """
        self._bind(cache)
        out = self._model.activations(rows)
        if probe is None:
            screened = best and self._screened and not rows.prompts
            self._model.run(rows, out, Part.GREEDY if screened else Part.ALL)
        else:
            self._run_probed(rows, out, probe)
        return out.logits

    def parts(self, rows: PagedRows, cache: KVCache) -> Callable[[Part, int | None], None]:
        """A step in parts, for who times them: call it with parts and a layer or None, Part.EMBED first."""
        self._bind(cache)
        return functools.partial(self._model.run, rows, self._model.activations(rows))

    def _bind(self, cache: KVCache) -> None:
        if self._cache is not cache:
            self._model.bind_cache(cache.layers)
            self._cache = cache

    def _run_probed(self, rows: PagedRows, out: Activations, probe: Probe) -> None:
        """Part by part, so that the probe sees what each adds to the residual stream."""
        self._run_part(rows, out, Part.EMBED, 0)
        probe.record("embedding", -1, out.x.clone())
        for layer, is_moe in enumerate(self._moe_layers):
            probe.record("attention", layer, self._run_part(rows, out, Part.ATTEND, layer))
            fed = self._run_part(rows, out, Part.FEED, layer)
            if is_moe:
                probe.record("topk_ids", layer, out.topk_ids.clone())
                probe.record("topk_weights", layer, out.topk_weights.clone())
            probe.record("moe" if is_moe else "mlp", layer, fed)
            probe.record("layer", layer, out.x.clone())
        self._run_part(rows, out, Part.HEAD, 0)
        probe.record("logits", -1, out.logits)

    def _run_part(self, rows: PagedRows, out: Activations, part: Part, layer: int) -> Tensor:
        """Run one part of one layer and return what it added, [T, H]."""
        before = out.x.clone()
        self._model.run(rows, out, part, layer)
        return out.x - before


def layer_weights(
    input_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, moe: MoEBlock | None, mlp: GatedMLP | None
) -> LayerWeights:
    """A loaded layer as the C kernels read it."""
    weights = LayerWeights({}, {"input_norm": input_norm.weight.data, "mlp_norm": mlp_norm.weight.data})
    weights.numbers.update(eps=input_norm.eps, hidden=input_norm.weight.shape[0])
    _add_attention(weights, attention)
    if moe is not None:
        _add_experts(weights, moe)
    if mlp is not None:
        _add_dense(weights, mlp)
    return weights


def _add_attention(weights: LayerWeights, attention: Attention) -> None:
    a = attention.config
    weights.numbers.update(
        num_heads=a.num_heads, num_kv_heads=a.num_kv_heads, head_dim=a.head_dim, rotary_dim=a.rope.rotary_dim,
        window=attention.window or 0, qk_norm=_QK_NORM[a.qk_norm], clip=a.clip_qkv or 0.0,
    )  # fmt: skip
    if a.qk_norm != "none":
        weights.tensors.update(q_norm=attention.q_norm.weight.data, k_norm=attention.k_norm.weight.data)
    weights.linears.update(qkv=_linear(attention.qkv), out=_linear(attention.out))


def _add_experts(weights: LayerWeights, moe: MoEBlock) -> None:
    experts, router, dispatcher = moe.experts, moe.router, moe.dispatcher
    assert isinstance(dispatcher, LocalDispatcher), "the C kernels run a whole model on one rank"
    weights.numbers.update(
        num_experts=router.weight.shape[0], num_slots=experts.num_slots, top_k=router.top_k,
        renormalize=int(router.renormalize), expert_width=experts.width,
    )  # fmt: skip
    weights.tensors.update(router=router.weight.data, slot_of=dispatcher.slot_of)
    for name in ("gate_up", "down"):
        weights.linears[name] = (experts.quantized.get(name) or getattr(experts, name).data, None)
    if moe.shared is not None:
        _add_dense(weights, moe.shared)
    if moe.shared_gate is not None:
        weights.linears["dense_gate"] = _linear(moe.shared_gate)


def _add_dense(weights: LayerWeights, mlp: GatedMLP) -> None:
    weights.linears.update(dense_gate_up=_linear(mlp.gate_up), dense_down=_linear(mlp.down))
    weights.numbers["dense_width"] = weights.linears["dense_down"][0].shape[1]


def screen_of(head: Weights) -> Screen | None:
    """The head's screen, which adds half its bytes; None if it is in few bits itself, or too wide."""
    if isinstance(head, QuantizedMatrix) or head.shape[1] > MOST_COLUMNS:
        return None
    screen = Screen.empty(*head.shape)
    move_to_large_pages(screen.tensors())
    return screen.fill(head)


def _linear(linear: Linear | nn.Module) -> tuple[Weights, Tensor | None]:
    assert isinstance(linear, Linear)
    return weight_of(linear), None if linear.bias is None else linear.bias.data


def weight_of(module: Linear | Embedding) -> Weights:
    """The weight as it was loaded."""
    if module.quantized is not None:
        return module.quantized
    assert module.weight is not None
    return module.weight.data
