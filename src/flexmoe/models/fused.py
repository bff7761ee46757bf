"""FusedDecoder: the decoder in Triton kernels, for steps of rows with one query each.

Enters: a loaded Decoder, whose weights it reads where they are, and rows on the device. Leaves: logits and tokens, on
the device. Nothing in a step waits for the device or depends on the numbers there, so it can be captured in a CUDA
graph (`engine/cuda_graph.py`).

The residual stream is fp32; between kernels stands the model's dtype. There are two regimes. With few rows every
(token, expert) pair reads its expert for itself; with more, rows are grouped by expert and meet it in one product.
Where the one ends, and how each launch is cut, is measured (`fused_tiles.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.kernels.decode_attention import DecodeRows, QKNormWeights
from flexmoe.kernels.swiglu import swiglu
from flexmoe.kernels.triton import argmax, norm_linear, sample
from flexmoe.kernels.triton.combine import combine
from flexmoe.kernels.triton.decode_attention import decode_attention, workspace_shapes
from flexmoe.kernels.triton.embed import embed
from flexmoe.kernels.triton.expert_down import expert_down_gemv, expert_down_grouped
from flexmoe.kernels.triton.expert_gate_up import expert_gate_up_gemv, expert_gate_up_grouped
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.rms_norm import rms_norm
from flexmoe.kernels.triton.route import route
from flexmoe.kernels.triton.tiles import TileTable, tiles_for
from flexmoe.kernels.triton.topk import topk
from flexmoe.kernels.triton.topk_by_expert import topk_by_expert
from flexmoe.layers.attention import Attention
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.layers.linear import Linear
from flexmoe.layers.mlp import GatedMLP
from flexmoe.layers.norm import RMSNorm
from flexmoe.layers.rotary import rotary_tables
from flexmoe.models.decoder import Decoder, DecoderLayer
from flexmoe.models.device_rows import MAX_ROWS, PDL_CAPABILITY, DeviceRows, Sampling
from flexmoe.models.fused_tiles import StepTiles
from flexmoe.moe.block import MoEBlock


class Buffers:
    """Activations and scratch of the largest step; all layers share them. Those of T rows are the first T."""

    def __init__(
        self,
        config: ModelConfig,
        linears: Iterable[tuple[int, int]],
        tiles: StepTiles,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
    ) -> None:
        """linears: (N, K) of all dense projections."""

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(max_rows, *shape, dtype=dtype, device=device)

        a = config.attention
        self.x = empty(config.hidden_size, dtype=torch.float32)  # the residual stream
        self.normed = empty(config.hidden_size)
        self.qkv = empty(config.qkv_size)
        self.attended = empty(a.num_heads * a.head_dim)
        self.logits = empty(config.vocab_size, dtype=torch.float32)
        self.token_ids = empty(dtype=torch.int64)
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        if config.moe is not None:
            m = config.moe
            self.router_logits = empty(m.num_experts, dtype=torch.float32)
            self.topk_ids = empty(m.top_k, dtype=torch.int32)
            self.topk_weights = empty(m.top_k, dtype=torch.float32)
            self.hidden = empty(m.top_k, m.expert_width)
            self.expert_out = empty(m.top_k, config.hidden_size)
            self.grouped = torch.empty(m.num_experts * max_rows, dtype=torch.int32, device=device)
            self.counts = torch.empty(m.num_experts, dtype=torch.int32, device=device)
        steps = range(1, max_rows + 1)
        size = max(
            norm_linear.scratch_bytes(t, n, k, dtype, norm=norm, tile=tiles.linear(t, n, k, norm=norm))
            for t, (n, k), norm in itertools.product(steps, linears, (False, True))
        )
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device)
        vocab = config.vocab_size
        words = max(max(argmax.scratch_words(t, vocab), sample.scratch_words(t, vocab)) for t in steps)
        self.sampler_scratch = torch.empty(words, dtype=torch.int64, device=device)
        parts = max(t * tiles.attention(t, long=long).splits for t in steps for long in (False, True))  # of one head
        partial, logsum = workspace_shapes(parts, a.num_heads, a.head_dim, 1)
        self.attention = (
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.empty(logsum, dtype=torch.float32, device=device),
        )


class FusedLayer:
    """One decoder layer over the shared buffers."""

    def __init__(
        self, layer: DecoderLayer, config: ModelConfig, buffers: Buffers, tiles: StepTiles, *, pdl: bool
    ) -> None:
        self.index, self._buffers, self._tiles, self._pdl = layer.index, buffers, tiles, pdl
        self._input_norm, self._mlp_norm = layer.input_norm, layer.mlp_norm
        self._qkv, self._out = layer.attention.qkv, layer.attention.out
        self._clip, self._window = config.attention.clip_qkv, layer.attention.window
        self._qk_norm = _qk_norm(layer.attention)
        self._moe, self._mlp = layer.moe, layer.mlp
        self.stage = "mlp" if layer.moe is None else "moe"
        if layer.moe is not None:
            self._router_weight = narrowest(layer.moe.router.weight.data, buffers.normed.dtype)

    def attend(self, rows: DecodeRows, cos: Tensor, sin: Tensor, cache: Tensor, *, long: bool) -> None:
        """x += attention(norm(x)) for all rows; writes their keys and values."""
        b, count = self._buffers, len(rows.lengths)
        x, qkv, attended = b.x[:count], b.qkv[:count], b.attended[:count]
        self._linear(x, self._qkv, qkv, norm=self._input_norm)
        decode_attention(
            qkv, cache, rows, cos, sin, attended, norm=self._qk_norm, clip=self._clip, window=self._window,
            workspace=b.attention, tile=self._tiles.attention(count, long=long), pdl=self._pdl,
        )  # fmt: skip
        self._linear(attended, self._out, x, residual=True)

    def feed(self, lengths: Tensor) -> None:
        """x += MoE block or MLP of norm(x)."""
        b, count = self._buffers, len(lengths)
        x, normed = b.x[:count], b.normed[:count]
        if self._moe is None:
            assert self._mlp is not None
            self._norm(x, normed)
            self._add_mlp(self._mlp, normed, x, None)
            return
        self._add_experts(self._moe, lengths)
        if self._moe.shared is not None:
            self._add_mlp(self._moe.shared, normed, x, self._moe.shared_gate)

    def _add_experts(self, moe: MoEBlock, lengths: Tensor) -> None:
        b, count = self._buffers, len(lengths)
        norm, router = self._mlp_norm, self._router_weight
        route(
            b.x[:count], norm.weight.data, norm.eps, router, b.normed[:count], b.router_logits[:count],
            tile=self._tiles.route(count, router.dtype), pdl=self._pdl,
        )  # fmt: skip
        if self._tiles.reads_alone(count):
            self._add_alone(moe, lengths)
        else:
            self._add_grouped(moe, lengths)

    def _add_alone(self, moe: MoEBlock, lengths: Tensor) -> None:
        """Each (token, expert) pair by itself; experts are chosen within the first launch."""
        b, count, pdl = self._buffers, len(lengths), self._pdl
        logits, ids, weights = b.router_logits[:count], b.topk_ids[:count], b.topk_weights[:count]
        hidden = b.hidden[:count].flatten(0, 1)
        first, second = self._tiles.few_experts(count)
        expert_gate_up_gemv(
            b.normed[:count], logits, ids, weights, moe.experts.gate_up.data, hidden,
            renormalize=moe.router.renormalize, lengths=lengths, tile=first, pdl=pdl,
        )  # fmt: skip
        down = moe.experts.down.data
        expert_down_gemv(hidden, ids, weights, down, b.x[:count], logits=logits, lengths=lengths, tile=second, pdl=pdl)

    def _add_grouped(self, moe: MoEBlock, lengths: Tensor) -> None:
        """Rows of one expert together."""
        b, count, pdl = self._buffers, len(lengths), self._pdl
        logits, ids, weights = b.router_logits[:count], b.topk_ids[:count], b.topk_weights[:count]
        hidden, out = b.hidden[:count].flatten(0, 1), b.expert_out[:count].flatten(0, 1)
        gate_up, down, renormalize = moe.experts.gate_up.data, moe.experts.down.data, moe.router.renormalize
        slots, counts = len(gate_up), b.counts
        grouped = b.grouped[: slots * count].view(slots, count)
        if self._tiles.groups_in_one(count, slots):
            topk_by_expert(logits, ids, weights, grouped, counts, renormalize=renormalize, lengths=lengths, pdl=pdl)
        else:
            topk(logits, ids, weights, renormalize=renormalize, lengths=lengths, pdl=pdl)
            group_by_expert(ids, slots, grouped, counts, pdl=pdl)
        first, second = self._tiles.many_experts(count)
        normed, top_k = b.normed[:count], ids.shape[1]
        expert_gate_up_grouped(normed, grouped, counts, gate_up, hidden, top_k=top_k, tile=first, pdl=pdl)
        expert_down_grouped(hidden, grouped, counts, weights, down, out, tile=second, pdl=pdl)
        combine(out, ids, b.x[:count], accumulate=True, pdl=pdl)

    def _add_mlp(self, mlp: GatedMLP, normed: Tensor, x: Tensor, gate: Linear | None) -> None:
        """A dense MLP, or the expert that every token takes. In torch between its projections: few models have one."""
        gate_up = torch.empty(len(x), weight_of(mlp.gate_up).shape[0], dtype=normed.dtype, device=x.device)
        self._linear(normed, mlp.gate_up, gate_up)
        hidden = swiglu(gate_up)
        if gate is not None:
            hidden *= torch.sigmoid(torch.nn.functional.linear(normed, weight_of(gate)))
        self._linear(hidden, mlp.down, x, residual=True)

    def _norm(self, x: Tensor, out: Tensor) -> None:
        rms_norm(x, self._mlp_norm.weight.data, self._mlp_norm.eps, out, pdl=self._pdl)

    def _linear(
        self, x: Tensor, linear: Linear, out: Tensor, *, norm: RMSNorm | None = None, residual: bool = False
    ) -> None:
        bias = None if linear.bias is None else linear.bias.data
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
        weight = weight_of(linear)
        tile = self._tiles.linear(len(x), *weight.shape, norm=norm is not None)
        norm_linear.norm_linear(
            x, weight, out, norm_weight=norm_weight, eps=eps, bias=bias, residual=residual,
            scratch=self._buffers.scratch, tile=tile, pdl=self._pdl,
        )  # fmt: skip


class FusedDecoder:
    """Computes decode steps of a loaded Decoder; see `DeviceDecoder` for what its attributes hold."""

    def __init__(
        self,
        model: Decoder,
        max_position: int,
        device: torch.device,
        table: TileTable | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """table: measured tiles; None: those of the package and of the user for this GPU. max_rows: of a step."""
        config = model.config
        embedding, self._norm = model.embed_tokens.weight.data, model.norm
        self._embedding = embedding
        self._head = embedding if model.lm_head is None else weight_of(model.lm_head)
        self._pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
        projections = [tuple(weight_of(m).shape) for m in model.modules() if isinstance(m, Linear)]
        shapes = {(n, k) for n, k in [*projections, tuple(self._head.shape)]}
        self._tiles = StepTiles(tiles_for(device) if table is None else table, config, embedding.dtype)
        self._buffers = Buffers(config, shapes, self._tiles, embedding.dtype, device, max_rows)
        self.logits, self.sampled = self._buffers.logits, self._buffers.sampled
        cos, sin = rotary_tables(config.attention.rope, max_position)
        self._cos, self._sin = cos.to(device), sin.to(device)
        layers, tiles = model.decoder_layers, self._tiles
        self._layers = [FusedLayer(layer, config, self._buffers, tiles, pdl=self._pdl) for layer in layers]

    @property
    def buffers(self) -> Buffers:
        """What steps compute in, for those who check a kernel."""
        return self._buffers

    def step(
        self,
        rows: DeviceRows,
        sampling: Sampling | None,
        cache: KVCache,
        probe: Probe | None = None,
        *,
        long: bool = False,
    ) -> None:
        """Compute the rows, write their keys and values, sample (greedily without `sampling`).

        long: cut attention for thousands of keys a row.
        """
        b, count = self._buffers, len(rows.lengths)
        x = b.x[:count]
        embed(rows.token_ids, rows.sources, b.sampled, self._embedding, x, b.token_ids[:count], pdl=self._pdl)
        seen = _Seen(probe, x)
        seen.record("embedding", -1, x)
        paged = DecodeRows(rows.lengths, rows.tables, rows.table_stride, cache.block_size)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            layer.attend(paged, self._cos, self._sin, layer_cache, long=long)
            seen.added("attention", layer.index)
            layer.feed(rows.lengths)
            if layer.stage == "moe":
                seen.record("topk_ids", layer.index, b.topk_ids[:count])
                seen.record("topk_weights", layer.index, b.topk_weights[:count])
            seen.added(layer.stage, layer.index)
            seen.record("layer", layer.index, x)
        logits = b.logits[:count]
        norm_linear.norm_linear(
            x, self._head, logits, norm_weight=self._norm.weight.data, eps=self._norm.eps, scratch=b.scratch,
            tile=self._tiles.linear(count, *self._head.shape, norm=True), pdl=self._pdl,
        )  # fmt: skip
        seen.record("logits", -1, logits)
        self._sample(logits, sampling)

    def _sample(self, logits: Tensor, sampling: Sampling | None) -> None:
        out = self._buffers.sampled[: len(logits)]
        if sampling is None:
            argmax.greedy(logits, out, self._buffers.sampler_scratch, pdl=self._pdl)
        else:
            scratch, filtered = self._buffers.sampler_scratch, sampling.filtered
            sample.sample(logits, sampling.params, out, scratch, filtered=filtered, pdl=self._pdl)


class _Seen:
    """Shows the probe what a step computes: stages add to the residual stream, which is not kept by itself."""

    def __init__(self, probe: Probe | None, x: Tensor) -> None:
        self._probe, self._x = probe, x
        self._before = x if probe is None else x.clone()

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Show a copy of a tensor, which the next layer overwrites."""
        if self._probe is not None:
            self._probe.record(stage, layer, tensor.clone())

    def added(self, stage: str, layer: int) -> None:
        """Show what came to the residual stream since the last call."""
        if self._probe is not None:
            self._probe.record(stage, layer, self._x - self._before)
            self._before = self._x.clone()


def weight_of(linear: Linear) -> Tensor:
    """A projection's loaded weight."""
    assert linear.weight is not None
    return linear.weight.data


def narrowest(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 weight in `dtype` if that loses nothing, as where the checkpoint had it so; else as it is."""
    narrow = weight.to(dtype)
    return narrow if torch.equal(narrow.float(), weight) else weight


def _qk_norm(attention: Attention) -> QKNormWeights | None:
    kind = attention.config.qk_norm
    if kind == "none":
        return None
    query, key = attention.q_norm, attention.k_norm
    return QKNormWeights(query.weight.data, key.weight.data, query.eps, full=kind == "full")
