"""FusedDecoder: the decoder in Triton kernels, for steps of rows with one query each.

Enters: a loaded Decoder, whose weights it reads where they are, and rows on the device. Leaves: logits and tokens, on
the device. Nothing in a step waits for the device or depends on the numbers there, so it can be captured in a CUDA
graph (`engine/cuda_graph.py`).

The residual stream is fp32; between kernels stands the model's dtype. There are two regimes. With few rows every
(token, expert) pair reads its expert for itself; with more, rows are grouped by expert and meet it in one product.
Where the one ends, and how each launch is cut, is measured (`fused_tiles.py`). A launch that has whole rows of the
residual stream in hand norms them for what comes next.

On several ranks the same kernels compute a rank's heads, columns and experts; what ranks then exchange is in
`fused_ranks.py`, `fused_data_ranks.py` and `fused_vocabulary.py`. One rank launches nothing for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.engine import MAX_ROWS
from flexmoe.config.model import ModelConfig
from flexmoe.kernels.decode_attention import DecodeRows, QKNormWeights
from flexmoe.kernels.swiglu import swiglu
from flexmoe.kernels.triton import norm_linear
from flexmoe.kernels.triton.cache_keys import fix_cache_keys
from flexmoe.kernels.triton.count_choices import count_choices
from flexmoe.kernels.triton.decode_attention import decode_attention
from flexmoe.kernels.triton.rms_norm import rms_norm
from flexmoe.kernels.triton.tiles import TileTable, tiles_for
from flexmoe.layers.attention import Attention
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.layers.linear import Linear
from flexmoe.layers.mlp import GatedMLP
from flexmoe.layers.norm import RMSNorm
from flexmoe.layers.rotary import rotary_tables
from flexmoe.models.decoder import Decoder, DecoderLayer
from flexmoe.models.device_rows import PDL_CAPABILITY, DeviceRows, Sampling
from flexmoe.models.fused_buffers import Buffers
from flexmoe.models.fused_data_ranks import GatheredRows, gathered_of
from flexmoe.models.fused_experts import FusedExperts
from flexmoe.models.fused_ranks import SharedSums, sums_of
from flexmoe.models.fused_tiles import StepTiles
from flexmoe.models.fused_vocabulary import Vocabulary
from flexmoe.models.hopper import HopperKernels, hopper_kernels
from flexmoe.models.seen import Seen
from flexmoe.moe.load import ExpertCounter
from flexmoe.parallel.mesh import Mesh


class FusedLayer:
    """One decoder layer over the shared buffers. config: with the widths of this rank."""

    def __init__(
        self,
        layer: DecoderLayer,
        config: ModelConfig,
        buffers: Buffers,
        tiles: StepTiles,
        following: RMSNorm,
        sums: SharedSums | None,
        gathered: GatheredRows | None,
        mesh: Mesh,
        *,
        pdl: bool,
    ) -> None:
        """following: the norm that comes after the layer. sums: of what ranks compute together; None for one rank.

        gathered: of the rows that experts see; None if these are the own ones.
        """
        self.index, self._buffers, self._tiles, self._pdl = layer.index, buffers, tiles, pdl
        self._sums, self._gathered = sums, gathered
        self._input_norm, self._mlp_norm, self._following = layer.input_norm, layer.mlp_norm, following
        self._qkv, self._out = layer.attention.qkv, layer.attention.out
        self._clip, self._window = config.attention.clip_qkv, layer.attention.window
        self._qk_norm = qk_norm(layer.attention)
        self._mlp, moe = layer.mlp, layer.moe
        self.stage = "mlp" if moe is None else "moe"
        self._experts = None if moe is None else FusedExperts(layer, moe, config, buffers, tiles, mesh, pdl=pdl)
        self._shared = None if moe is None else moe.shared
        self._shared_gate = None if moe is None else moe.shared_gate

    @property
    def choices(self) -> Tensor:
        """Experts chosen for the rows of the latest step that experts saw, int32 [rows, K]; of a layer with some."""
        assert self._experts is not None
        return self._experts.ids

    def attend(self, rows: DecodeRows, cos: Tensor, sin: Tensor, cache: Tensor, *, normed: bool, long: bool) -> bool:
        """x += attention(norm(x)) for all rows; writes their keys and values.

        normed: the buffer of that name holds norm(x). Returns whether it does for what comes next.
        """
        b, count = self._buffers, len(rows.lengths)
        x, qkv, attended = b.x[:count], b.qkv[:count], b.attended[:count]
        if normed:
            self._linear(b.normed[:count], self._qkv, qkv, is_normed=True)
        else:
            self._linear(x, self._qkv, qkv, norm=self._input_norm)
        norm = self._qk_norm
        if self._sums is not None and norm is not None and norm.full:  # over heads of other ranks, too
            self._sums.norm_heads(qkv, norm)
            norm = None
        decode_attention(
            qkv, cache, rows, cos, sin, attended, norm=norm, clip=self._clip, window=self._window,
            workspace=b.attention, tile=self._tiles.attention(count, long=long), pdl=self._pdl,
        )  # fmt: skip
        after = self._norm_after_attention(count)
        self._add(attended, self._out, x, after)
        return after is not None

    def _norm_after_attention(self, count: int) -> norm_linear.NormAfter | None:
        """The norm of the feed-forward, where a launch that there is anyway can do it and the router need not."""
        experts = self._experts
        if experts is None or (self._gathered is None and not experts.norms_first(count)):
            return None
        if self._sums is None:
            can = norm_linear.norms_after(self._tile(count, self._out, norm=False))
        else:
            can = self._sums.norms(count)
        return self._norm_after(self._mlp_norm, count) if can else None

    def _norm_after(self, norm: RMSNorm, count: int) -> norm_linear.NormAfter:
        return norm_linear.NormAfter(norm.weight.data, norm.eps, self._buffers.normed[:count])

    def feed(self, count: int, lengths: Tensor, *, normed: bool) -> bool:
        """x += MoE block or MLP of norm(x), of `count` rows. normed, and what is returned: as for `attend`.

        lengths: of the rows that experts see, those of all data ranks.
        """
        b = self._buffers
        x, rows, experts = b.x[:count], b.normed[:count], self._experts
        if experts is None:
            assert self._mlp is not None
            self._norm(x, rows)
            self._add_mlp(self._mlp, rows, x, None)
            return False
        if self._gathered is not None:
            return self._feed_gathered(experts, lengths, x, self._gathered, is_normed=normed)
        experts.route(x, rows, is_normed=normed, pdl=self._pdl)
        if self._sums is not None:
            experts.add(rows, lengths, self._sums.part(count), accumulate=False)
            return self._add_parts(x, self._sums)
        then = self._norm_after(self._following, count) if self._shared is None else None
        done = experts.add(rows, lengths, x, accumulate=True, then=then)
        if self._shared is not None:
            self._add_mlp(self._shared, rows, x, self._shared_gate)
        return done

    def _add_parts(self, x: Tensor, sums: SharedSums) -> bool:
        """x += what is in this rank's part, and its share of the expert that every token takes, with the others'.

        Returns as `feed`.
        """
        count, shared = len(x), self._shared_part(len(x))
        if shared is not None:
            part = sums.part(count)
            part += shared
        norms = sums.norms(count)
        sums.add_experts(x, self._norm_after(self._following, count) if norms else None)
        return norms

    def _shared_part(self, count: int) -> Tensor | None:
        """What this rank's share of the expert that every token takes gives for the normed rows, in their place."""
        if self._shared is None:
            return None
        normed = self._buffers.normed[:count]
        self._linear(self._hidden(self._shared, normed, self._shared_gate), self._shared.down, normed)
        return normed

    def _feed_gathered(
        self, experts: FusedExperts, lengths: Tensor, x: Tensor, gathered: GatheredRows, *, is_normed: bool
    ) -> bool:
        """The experts here see the rows of all data ranks, which then each get the sums of their own.

        Returns as `feed`.
        """
        count, rows = len(x), self._buffers.normed[: len(x)]
        if not is_normed:
            self._norm(x, rows)
        everybody, pdl = gathered.rows(count), self._pdl and gathered.may_overlap(count)  # [R T, H]
        experts.route(everybody, everybody, is_normed=True, pdl=pdl)
        experts.add(everybody, lengths, gathered.part(count), accumulate=False)
        if self._sums is not None:
            shared, own = self._shared_part(count), gathered.own_sums(count)  # [T, H]
            self._sums.part(count).copy_(own if shared is None else own + shared)
            self._sums.add_experts(x)
            return False
        if self._shared is not None:
            self._add_mlp(self._shared, rows, x, self._shared_gate)
        gathered.add(x, self._norm_after(self._following, count))
        return True

    def _add_mlp(self, mlp: GatedMLP, normed: Tensor, x: Tensor, gate: Linear | None) -> None:
        """x += a dense MLP, or the expert that every token takes."""
        self._add(self._hidden(mlp, normed, gate), mlp.down, x)

    def _hidden(self, mlp: GatedMLP, normed: Tensor, gate: Linear | None) -> Tensor:
        """What its projection back takes. In torch between the projections: few models have one."""
        shape = (len(normed), weight_of(mlp.gate_up).shape[0])
        gate_up = torch.empty(shape, dtype=normed.dtype, device=normed.device)
        self._linear(normed, mlp.gate_up, gate_up)
        hidden = swiglu(gate_up)
        if gate is not None:
            hidden *= torch.sigmoid(torch.nn.functional.linear(normed, weight_of(gate)))
        return hidden

    def _add(self, rows: Tensor, linear: Linear, x: Tensor, after: norm_linear.NormAfter | None = None) -> None:
        """x += linear(rows), of which each rank holds some columns."""
        if self._sums is None:
            self._linear(rows, linear, x, residual=True, after=after)
        else:
            self._linear(rows, linear, self._sums.part(len(x)))
            self._sums.add_product(x, after)

    def _norm(self, x: Tensor, out: Tensor) -> None:
        rms_norm(x, self._mlp_norm.weight.data, self._mlp_norm.eps, out, pdl=self._pdl)

    def _tile(self, rows: int, linear: Linear, *, norm: bool) -> norm_linear.Tile:
        return self._tiles.linear(rows, *weight_of(linear).shape, norm=norm)

    def _linear(
        self,
        x: Tensor,
        linear: Linear,
        out: Tensor,
        *,
        norm: RMSNorm | None = None,
        is_normed: bool = False,
        residual: bool = False,
        after: norm_linear.NormAfter | None = None,
    ) -> None:
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
        norm_linear.norm_linear(
            x, weight_of(linear), out, norm_weight=norm_weight, eps=eps, bias=linear.added, residual=residual,
            after=after, scratch=self._buffers.scratch, pdl=self._pdl,
            tile=self._tile(len(x), linear, norm=is_normed or norm is not None),
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
        *,
        pdl: bool | None = None,
        hopper: HopperKernels | None = None,
    ) -> None:
        """table: measured tiles; None: those of the package and of the user for this GPU. max_rows: of a step.

        pdl: whether kernels are launched before those ahead of them have ended; None: if the GPU can. hopper: None for
        the kernels that serve the model on this GPU, of which decodes take that of experts with many rows.
        """
        fix_cache_keys()
        mesh, self._norm = model.mesh, model.norm
        config = mesh.shard(model.config).local
        embedding = model.embed_tokens.table()
        dtype = embedding.dtype
        self._head = embedding if model.lm_head is None else weight_of(model.lm_head)
        can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
        self._pdl = can if pdl is None else pdl
        products = (hopper or hopper_kernels(device, config, dtype)).products
        self._tiles = tiles = StepTiles(tiles_for(device) if table is None else table, config, dtype, products)
        shapes = {(n, k) for n, k in (*_projections(model), tuple(self._head.shape))}
        slots = max(
            (len(layer.moe.experts.gate_up) for layer in model.decoder_layers if layer.moe is not None), default=0
        )
        sums = sums_of(mesh, config.hidden_size, dtype, device, max_rows, pdl=self._pdl)
        self._gathered = gathered = gathered_of(model, dtype, device, max_rows, pdl=self._pdl)
        seen_rows = max_rows if gathered is None else gathered.max_rows
        self._buffers = b = Buffers(config, shapes, slots, tiles, dtype, device, max_rows, seen_rows)
        if gathered is not None:
            b.normed = gathered.normed  # which other ranks may read
        self._vocabulary = Vocabulary(model, sums, device, max_rows, pdl=self._pdl)
        self.logits, self.sampled = self._vocabulary.whole, self._vocabulary.sampled
        self.spread = sums is not None
        self.kernels = "Triton" if sums is None else f"Triton, sums over ranks by {sums.how}"
        self.kernels += "" if gathered is None else f", rows of data ranks by {gathered.how}"
        cos, sin = rotary_tables(config.attention.rope, max_position)
        self._cos, self._sin = cos.to(device), sin.to(device)
        layers = model.decoder_layers
        following = [*(layer.input_norm for layer in layers[1:]), model.norm]
        self._layers = [
            FusedLayer(layer, config, b, tiles, norm, sums, gathered, mesh, pdl=self._pdl)
            for layer, norm in zip(layers, following, strict=True)
        ]

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
        """See `DeviceDecoder.step`. long: cut attention for thousands of keys a row."""
        b, count, gathered = self._buffers, len(rows.lengths), self._gathered
        x, own = b.x[:count], slice(0, count) if gathered is None else gathered.own(count)
        lengths = rows.lengths if gathered is None else gathered.lengths(rows.lengths)
        self._vocabulary.embed(rows, x, b.token_ids[:count])
        seen = Seen(probe, x)
        seen.record("embedding", -1, x)
        paged = DecodeRows(rows.lengths, rows.tables, rows.table_stride, cache.block_size)
        normed = False
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            normed = layer.attend(paged, self._cos, self._sin, layer_cache, normed=normed, long=long)
            seen.added("attention", layer.index)
            normed = layer.feed(count, lengths, normed=normed)
            if layer.stage == "moe":
                seen.record("topk_ids", layer.index, layer.choices[own])
                seen.record("topk_weights", layer.index, b.topk_weights[own])
            seen.added(layer.stage, layer.index)
            seen.record("layer", layer.index, x)
        last, norm_weight = (b.normed[:count], None) if normed else (x, self._norm.weight.data)
        norm_linear.norm_linear(
            last, self._head, self._vocabulary.part[:count, : len(self._head)], norm_weight=norm_weight,
            eps=self._norm.eps, scratch=b.scratch, pdl=self._pdl,
            tile=self._tiles.linear(count, *self._head.shape, norm=True),
        )  # fmt: skip
        if probe is not None:
            seen.record("logits", -1, self._vocabulary.gather(count))
        self._vocabulary.sample(count, sampling)

    def count(self, rows: int, counter: ExpertCounter) -> None:
        """See `DeviceDecoder.count`."""
        own = slice(0, rows) if self._gathered is None else self._gathered.own(rows)
        count_choices(self._buffers.topk_ids[:, own], counter.counts, counter.active)


def _projections(model: Decoder) -> list[tuple[int, ...]]:
    return [tuple(weight_of(module).shape) for module in model.modules() if isinstance(module, Linear)]


def weight_of(linear: Linear) -> Tensor:
    """A projection's loaded weight."""
    assert linear.weight is not None
    return linear.weight.data


def qk_norm(attention: Attention) -> QKNormWeights | None:
    """The weights of its norm of queries and keys, if it has one."""
    kind = attention.config.qk_norm
    if kind == "none":
        return None
    query, key = attention.q_norm, attention.k_norm
    return QKNormWeights(query.weight.data, key.weight.data, query.eps, full=kind == "full")
