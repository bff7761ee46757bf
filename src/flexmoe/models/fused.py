"""FusedDecoder: the decoder in Triton kernels, for steps of rows with one query each.

Enters: a loaded Decoder, whose weights it reads where they are, and rows on the device. Leaves: logits and tokens, on
the device. Nothing in a step waits for the device or depends on the numbers there, so it can be captured in a CUDA
graph (`engine/cuda_graph.py`).

The residual stream is fp32; between kernels stands the model's dtype. There are two regimes. With few rows every
(token, expert) pair reads its expert for itself; with more, rows are grouped by expert and meet it in one product.
Where the one ends, and how each launch is cut, is measured (`fused_tiles.py`). A launch that has whole rows of the
residual stream in hand norms them for what comes next.

On several ranks the same kernels compute a rank's heads, columns and experts; what ranks then exchange is in
`fused_ranks.py` and `fused_vocabulary.py`. One rank launches nothing for it.
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
from flexmoe.kernels.triton.combine import combine, combine_norm
from flexmoe.kernels.triton.count_choices import count_choices
from flexmoe.kernels.triton.decode_attention import decode_attention
from flexmoe.kernels.triton.expert_down import expert_down_gemv, expert_down_grouped
from flexmoe.kernels.triton.expert_gate_up import expert_gate_up_gemv, expert_gate_up_grouped
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.rms_norm import rms_norm
from flexmoe.kernels.triton.route import norms_first, route
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
from flexmoe.models.device_rows import PDL_CAPABILITY, DeviceRows, Sampling
from flexmoe.models.fused_buffers import Buffers
from flexmoe.models.fused_ranks import SharedSums, slots_by_row, sums_of
from flexmoe.models.fused_tiles import StepTiles
from flexmoe.models.fused_vocabulary import Vocabulary
from flexmoe.models.seen import Seen
from flexmoe.moe.block import MoEBlock
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
        mesh: Mesh,
        *,
        pdl: bool,
    ) -> None:
        """following: the norm that comes after the layer. sums: of what ranks compute together; None for one rank."""
        self.index, self._buffers, self._tiles, self._pdl = layer.index, buffers, tiles, pdl
        self._sums, self._attention = sums, layer.attention
        self._input_norm, self._mlp_norm, self._following = layer.input_norm, layer.mlp_norm, following
        self._qkv, self._out = layer.attention.qkv, layer.attention.out
        self._clip, self._window = config.attention.clip_qkv, layer.attention.window
        self._qk_norm = qk_norm(layer.attention)
        self._moe, self._mlp = layer.moe, layer.mlp
        self.stage = "mlp" if layer.moe is None else "moe"
        if layer.moe is not None:
            self._router_weight = narrowest(layer.moe.router.weight.data, buffers.normed.dtype)
            slots = slots_by_row(mesh, len(layer.moe.router.weight), layer.index, buffers.x.device)
            self._slots = None if slots is None else slots.rows(len(buffers.x))
            self._ids = buffers.topk_ids[sum(before.is_moe for before in config.layers[: layer.index])]

    @property
    def choices(self) -> Tensor:
        """Experts that the rows of the latest step chose, int32 [rows, K]; of a layer that has some."""
        return self._ids

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
            qkv, norm = self._sums.norm_heads(qkv, norm, self._attention), None
        decode_attention(
            qkv, cache, rows, cos, sin, attended, norm=norm, clip=self._clip, window=self._window,
            workspace=b.attention, tile=self._tiles.attention(count, long=long), pdl=self._pdl,
        )  # fmt: skip
        after = self._norm_after_attention(count)
        self._add(attended, self._out, x, after)
        return after is not None

    def _norm_after_attention(self, count: int) -> norm_linear.NormAfter | None:
        """The norm of the feed-forward, where a launch that there is anyway can do it and the router need not."""
        if self._moe is None or not norms_first(self._tiles.route(count, self._router_weight)):
            return None
        if self._sums is None:
            can = norm_linear.norms_after(self._tile(count, self._out, norm=False))
        else:
            can = self._sums.norms(count)
        return self._norm_after(self._mlp_norm, count) if can else None

    def _norm_after(self, norm: RMSNorm, count: int) -> norm_linear.NormAfter:
        return norm_linear.NormAfter(norm.weight.data, norm.eps, self._buffers.normed[:count])

    def feed(self, lengths: Tensor, *, normed: bool) -> bool:
        """x += MoE block or MLP of norm(x). normed, and what is returned: as for `attend`."""
        b, count = self._buffers, len(lengths)
        x, rows = b.x[:count], b.normed[:count]
        if self._moe is None:
            assert self._mlp is not None
            self._norm(x, rows)
            self._add_mlp(self._mlp, rows, x, None)
            return False
        self._route(lengths, is_normed=normed)
        if self._sums is not None:
            return self._feed_shared(self._moe, lengths, self._sums)
        shared = self._moe.shared
        done = self._add_experts(self._moe, lengths, x, then=self._following if shared is None else None)
        if shared is not None:
            self._add_mlp(shared, rows, x, self._moe.shared_gate)
        return done

    def _feed_shared(self, moe: MoEBlock, lengths: Tensor, sums: SharedSums) -> bool:
        """What this rank's experts, and its share of the one that every token takes, give; added with the others'.

        Returns as `feed`.
        """
        b, count = self._buffers, len(lengths)
        part = sums.part(count)
        self._add_experts(moe, lengths, part)
        if moe.shared is not None:
            self._linear(self._hidden(moe.shared, b.normed[:count], moe.shared_gate), moe.shared.down, b.normed[:count])
            part += b.normed[:count]
        norms = sums.norms(count)
        sums.add_experts(b.x[:count], self._norm_after(self._following, count) if norms else None)
        return norms

    def _route(self, lengths: Tensor, *, is_normed: bool) -> None:
        b, count = self._buffers, len(lengths)
        norm, router = self._mlp_norm, self._router_weight
        route(
            b.x[:count], norm.weight.data, norm.eps, router, b.normed[:count], b.router_logits[:count],
            is_normed=is_normed, tile=self._tiles.route(count, router), pdl=self._pdl,
        )  # fmt: skip

    def _add_experts(self, moe: MoEBlock, lengths: Tensor, out: Tensor, then: RMSNorm | None = None) -> bool:
        """What the experts here give for the routed rows, to out: added to x, or by itself to a rank's part.

        then: the norm that x is for next. Returns whether the normed rows are there.
        """
        accumulate = self._sums is None
        if not len(moe.experts.gate_up):  # all are on other ranks, but choices are looked at here, too
            out.zero_()
            self._choose(moe, lengths)
        elif self._tiles.reads_alone(len(lengths)):
            self._add_alone(moe, lengths, out, accumulate=accumulate)
        else:
            places = self._compute_grouped(moe, lengths)
            results, normed = (
                self._buffers.expert_out[: len(lengths)].flatten(0, 1),
                self._buffers.normed[: len(lengths)],
            )
            if then is not None:
                combine_norm(results, places, out, then.weight.data, then.eps, normed, pdl=self._pdl)
                return True
            combine(results, places, out, accumulate=accumulate, pdl=self._pdl)
        return False

    def _add_alone(self, moe: MoEBlock, lengths: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """Each (token, expert) pair by itself; experts are chosen within the first launch."""
        b, count, pdl, slots = self._buffers, len(lengths), self._pdl, self._slots
        logits, ids, weights = b.router_logits[:count], self._ids[:count], b.topk_weights[:count]
        places = ids if slots is None else b.slot_ids[:count]
        hidden = b.hidden[:count].flatten(0, 1)
        first, second = self._tiles.few_experts(count, in_order=slots is None)
        expert_gate_up_gemv(
            b.normed[:count], logits, ids, weights, moe.experts.gate_up.data, hidden, slots=slots, slot_ids=places,
            renormalize=moe.router.renormalize, lengths=lengths, tile=first, pdl=pdl,
        )  # fmt: skip
        expert_down_gemv(
            hidden, places, weights, moe.experts.down.data, out, logits=logits, lengths=lengths,
            accumulate=accumulate, tile=second, pdl=pdl,
        )  # fmt: skip

    def _compute_grouped(self, moe: MoEBlock, lengths: Tensor) -> Tensor:
        """Rows of one expert together, each (token, expert) pair by itself to `expert_out`; returns where they are."""
        b, count, pdl = self._buffers, len(lengths), self._pdl
        hidden, rows_out = b.hidden[:count].flatten(0, 1), b.expert_out[:count].flatten(0, 1)
        gate_up, down, weights = moe.experts.gate_up.data, moe.experts.down.data, b.topk_weights[:count]
        slots, counts = len(gate_up), b.counts
        grouped = b.grouped[: slots * count].view(slots, count)
        if self._slots is None and self._tiles.groups_in_one(count, slots):
            places = self._ids[:count]
            topk_by_expert(
                b.router_logits[:count], places, weights, grouped, counts, renormalize=moe.router.renormalize,
                lengths=lengths, pdl=pdl,
            )  # fmt: skip
        else:
            places = self._choose(moe, lengths)
            group_by_expert(places, slots, grouped, counts, pdl=pdl)
        first, second = self._tiles.many_experts(count)
        normed, top_k = b.normed[:count], places.shape[1]
        expert_gate_up_grouped(normed, grouped, counts, gate_up, hidden, top_k=top_k, tile=first, pdl=pdl)
        expert_down_grouped(hidden, grouped, counts, weights, down, rows_out, tile=second, pdl=pdl)
        return places

    def _choose(self, moe: MoEBlock, lengths: Tensor) -> Tensor:
        """Each row's experts; returns where they are, int32 [T, K], -1 if elsewhere."""
        b, count, slots = self._buffers, len(lengths), self._slots
        ids = self._ids[:count]
        places = ids if slots is None else b.slot_ids[:count]
        topk(
            b.router_logits[:count], ids, b.topk_weights[:count], renormalize=moe.router.renormalize, lengths=lengths,
            slots=slots, slot_ids=places, pdl=self._pdl,
        )  # fmt: skip
        return places

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
    ) -> None:
        """table: measured tiles; None: those of the package and of the user for this GPU. max_rows: of a step.

        pdl: whether kernels are launched before those ahead of them have ended; None: if the GPU can.
        """
        fix_cache_keys()
        mesh, self._norm = model.mesh, model.norm
        config = mesh.shard(model.config).local
        embedding = model.embed_tokens.table()
        dtype = embedding.dtype
        self._head = embedding if model.lm_head is None else weight_of(model.lm_head)
        can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
        self._pdl = can if pdl is None else pdl
        self._tiles = tiles = StepTiles(tiles_for(device) if table is None else table, config, dtype)
        shapes = {(n, k) for n, k in (*_projections(model), tuple(self._head.shape))}
        slots = max(
            (len(layer.moe.experts.gate_up) for layer in model.decoder_layers if layer.moe is not None), default=0
        )
        self._buffers = b = Buffers(config, shapes, slots, tiles, dtype, device, max_rows)
        sums = sums_of(mesh, config.hidden_size, dtype, device, max_rows, pdl=self._pdl)
        self._vocabulary = Vocabulary(model, sums, device, max_rows, pdl=self._pdl)
        self.logits, self.sampled = self._vocabulary.whole, self._vocabulary.sampled
        self.spread = sums is not None
        self.kernels = "Triton" if sums is None else f"Triton, sums over ranks by {sums.how}"
        cos, sin = rotary_tables(config.attention.rope, max_position)
        self._cos, self._sin = cos.to(device), sin.to(device)
        layers = model.decoder_layers
        following = [*(layer.input_norm for layer in layers[1:]), model.norm]
        self._layers = [
            FusedLayer(layer, config, b, tiles, norm, sums, mesh, pdl=self._pdl)
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
        counter: ExpertCounter | None = None,
        long: bool = False,
    ) -> None:
        """See `DeviceDecoder.step`. long: cut attention for thousands of keys a row."""
        b, count = self._buffers, len(rows.lengths)
        x = b.x[:count]
        self._vocabulary.embed(rows, x, b.token_ids[:count])
        seen = Seen(probe, x)
        seen.record("embedding", -1, x)
        paged = DecodeRows(rows.lengths, rows.tables, rows.table_stride, cache.block_size)
        normed = False
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            normed = layer.attend(paged, self._cos, self._sin, layer_cache, normed=normed, long=long)
            seen.added("attention", layer.index)
            normed = layer.feed(rows.lengths, normed=normed)
            if layer.stage == "moe":
                seen.record("topk_ids", layer.index, layer.choices[:count])
                seen.record("topk_weights", layer.index, b.topk_weights[:count])
            seen.added(layer.stage, layer.index)
            seen.record("layer", layer.index, x)
        if counter is not None:
            count_choices(b.topk_ids[:, :count], counter.counts, counter.active, pdl=self._pdl)
        last, norm_weight = (b.normed[:count], None) if normed else (x, self._norm.weight.data)
        norm_linear.norm_linear(
            last, self._head, self._vocabulary.part[:count, : len(self._head)], norm_weight=norm_weight,
            eps=self._norm.eps, scratch=b.scratch, pdl=self._pdl,
            tile=self._tiles.linear(count, *self._head.shape, norm=True),
        )  # fmt: skip
        if probe is not None:
            seen.record("logits", -1, self._vocabulary.gather(count))
        self._vocabulary.sample(count, sampling)


def _projections(model: Decoder) -> list[tuple[int, ...]]:
    return [tuple(weight_of(module).shape) for module in model.modules() if isinstance(module, Linear)]


def weight_of(linear: Linear) -> Tensor:
    """A projection's loaded weight."""
    assert linear.weight is not None
    return linear.weight.data


def narrowest(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 weight in `dtype` if that loses nothing, as where the checkpoint had it so; else as it is."""
    narrow = weight.to(dtype)
    return narrow if torch.equal(narrow.float(), weight) else weight


def qk_norm(attention: Attention) -> QKNormWeights | None:
    """The weights of its norm of queries and keys, if it has one."""
    kind = attention.config.qk_norm
    if kind == "none":
        return None
    query, key = attention.q_norm, attention.k_norm
    return QKNormWeights(query.weight.data, key.weight.data, query.eps, full=kind == "full")
