"""PromptDecoder: the decoder for steps of many rows on a GPU: prompts, or parts of them; with all-to-all, all steps.

Enters: a loaded Decoder, whose weights it reads where they are, and rows on the device. Leaves: logits of the rows that
ask for them. Dense products are torch's; everything between them are kernels, some ten launches a layer: Triton's, and
on Hopper GPUs CUDA's for attention and experts (`models/hopper.py`). None waits for the device, and no shape depends on
how tokens were routed. Of the last layer's rows all leave keys and values, but only those whose logits are wanted are
queries, and go on behind attention.

The residual stream is fp32, as in decode steps (`models/fused.py`); a launch that has whole rows of it in hand norms
them for what comes next. On several ranks each computes its heads and experts, and parts are added by an all-reduce;
where tokens travel, the MoE block brings them to their experts, which may wait for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.config.powers import power_of_two
from flexmoe.kernels.hopper.attention import PromptAttention
from flexmoe.kernels.triton import argmax
from flexmoe.kernels.triton.begin_rows import RowPlaces, begin_rows
from flexmoe.kernels.triton.cache_keys import fix_cache_keys
from flexmoe.kernels.triton.combine import combine, combine_norm
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.prefill_attention import default_tile, prefill_attention
from flexmoe.kernels.triton.rotate_and_store import rotate_and_store
from flexmoe.kernels.triton.route import many_rows_tile, route
from flexmoe.kernels.triton.tiles import TileTable, tiles_for
from flexmoe.kernels.triton.topk import topk
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.layers.norm import RMSNorm
from flexmoe.layers.rotary import rotary_tables
from flexmoe.models.decoder import Decoder, DecoderLayer
from flexmoe.models.device_rows import PDL_CAPABILITY, PromptRows
from flexmoe.models.fused import qk_norm, weight_of
from flexmoe.models.fused_experts import narrowest
from flexmoe.models.fused_grouped import compute_grouped
from flexmoe.models.fused_ranks import norm_over_ranks, slots_by_row
from flexmoe.models.fused_tiles import StepTiles
from flexmoe.models.hopper import HopperKernels, hopper_kernels
from flexmoe.models.seen import Seen
from flexmoe.moe.block import MoEBlock
from flexmoe.parallel.mesh import Mesh

# Rows up to which queries, keys and values are one product in all layers. From 2,048 on cuBLAS zeroes a counter before
# it (6,144 columns, an H200; with 1,024 it does not). That is no kernel, and a graph's launch halts at what is none: in
# the first layer the GPU waited 50 to 100 us for the rest of the graph.
_PLAIN_PRODUCT = 1024


class PromptLayer:
    """One decoder layer. following: the norm that comes after it."""

    def __init__(
        self, layer: DecoderLayer, following: RMSNorm, tiles: StepTiles, mesh: Mesh, dtype: torch.dtype,
        attention: PromptAttention | None, *, pdl: bool,
    ) -> None:  # fmt: skip
        """attention: the kernel for Hopper, if it serves the model."""
        self.layer, self.index, self._following, self._mesh = layer, layer.index, following, mesh
        self._tiles, self._attention, self._pdl = tiles, attention, pdl
        self.stage = "mlp" if layer.moe is None else "moe"
        self._norm = qk_norm(layer.attention)
        self.travels = layer.moe is not None and mesh.plan.moves_tokens
        if layer.moe is not None and not self.travels:
            weight = layer.moe.router.weight.data
            self._router = narrowest(weight, dtype)
            self._slots = slots_by_row(mesh, len(weight), layer.index, weight.device)

    def attend(
        self, normed: Tensor, rows: PromptRows, places: RowPlaces, cos: Tensor, sin: Tensor, cache: Tensor,
        wanted: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What the heads make of the rows, [T, Hq D]; writes the rows' keys and values.

        wanted: int32 [M], some of the sample rows if only these are queries; other rows of the result say nothing.
        """
        attention = self.layer.attention
        a = attention.config
        qkv, norm = self._project(normed, wanted, graphed=rows.padded), self._norm
        spans = rows.spans if wanted is None else rows.sample_spans
        if norm is not None and norm.full and self._mesh.tp.size > 1:  # over heads of other ranks, too
            norm_over_ranks(qkv, norm, self._mesh.tp)
            norm = None
        query = qkv.new_empty(len(qkv), a.num_heads * a.head_dim)
        attended, hopper = torch.empty_like(query), self._attention
        fresh = None if hopper is None else qkv.new_empty(len(qkv), *cache.shape[1:])
        rotate_and_store(
            qkv, cache, places.positions, places.slots, cos, sin, query, norm=norm, clip=a.clip_qkv, fresh=fresh,
            pdl=self._pdl,
        )  # fmt: skip
        if hopper is None or fresh is None:
            prefill_attention(query, cache, spans, attended, window=attention.window)
        else:
            hopper(query, fresh, cache, spans, attended, window=attention.window, pdl=self._pdl)
        return attended

    def _project(self, normed: Tensor, wanted: Tensor | None, *, graphed: bool) -> Tensor:
        """Queries, keys and values of the rows; queries of `wanted` rows alone, if those are given."""
        qkv, a = self.layer.attention.qkv, self.layer.attention.config
        weight, added, heads = weight_of(qkv), qkv.added, a.num_heads * a.head_dim
        in_two = graphed and self.index == 0 and len(normed) > _PLAIN_PRODUCT
        if wanted is None and not in_two:
            return F.linear(normed, weight, added)
        made = normed.new_empty(len(normed), len(weight))
        queries, others = made[:, :heads], made[:, heads:]
        of_queries, of_others = (None, None) if added is None else (added[:heads], added[heads:])
        _linear(normed, weight[heads:], of_others, others)
        if wanted is None:
            _linear(normed, weight[:heads], of_queries, queries)
            return made
        queries.zero_()  # nobody reads other rows, but what memory held might overflow on the way
        queries.index_copy_(0, wanted.long(), F.linear(normed.index_select(0, wanted), weight[:heads], of_queries))
        return made

    def project(self, x: Tensor, attended: Tensor) -> Tensor:
        """x += the attention's output, of what its heads made. Returns the rows normed for what comes next."""
        output = self.layer.attention.out
        out = F.linear(attended, weight_of(output), output.added)
        return self._add(x, self._mesh.tp.all_reduce(out, "linear"), self.layer.mlp_norm)

    def feed(self, x: Tensor, normed: Tensor, lengths: Tensor | None, seen: Seen, most_rows: int | None) -> Tensor:
        """x += MoE block or MLP of the normed rows. Returns the rows normed for what comes next."""
        moe = self.layer.moe
        if self.travels:
            assert moe is not None
            return self._add(x, moe(normed, seen.probe, most_rows), self._following)
        if moe is None:
            assert self.layer.mlp is not None
            return self._add(x, self.layer.mlp(normed), self._following)
        shared = None if moe.shared is None else moe.shared_output(normed)
        ids, weights, places = self._route(moe, x, normed, lengths)
        seen.record("topk_ids", self.index, ids)
        seen.record("topk_weights", self.index, weights)
        y = self._experts(moe, normed, places, weights)
        out, norm = torch.empty_like(normed), self._following
        if self._mesh.stage.size > 1:
            combine(y, places, out, accumulate=False)
            out = out if shared is None else out.add_(shared)
            return self._add(x, self._mesh.stage.all_reduce(out, "combine"), norm)
        if shared is not None:
            x += shared
        combine_norm(y, places, x, norm.weight.data, norm.eps, out, pdl=self._pdl)
        return out

    def _add(self, x: Tensor, part: Tensor, norm: RMSNorm) -> Tensor:
        """x += part; returns the sum normed: what `combine_norm` does for one expert a row."""
        out = torch.empty_like(part)
        combine_norm(part, None, x, norm.weight.data, norm.eps, out)
        return out

    def _route(self, moe: MoEBlock, x: Tensor, normed: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's experts, int32 [T, K], their weights, fp32, and their slots, -1 where another rank has them.

        Padding chooses -1.
        """
        T, E, K = len(x), len(self._router), moe.router.top_k
        logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
        tile, norm = many_rows_tile(T, E, self._router.itemsize), self.layer.mlp_norm
        pdl = self._pdl
        route(x, norm.weight.data, norm.eps, self._router, normed, logits, is_normed=True, tile=tile, pdl=pdl)
        ids = torch.empty(T, K, dtype=torch.int32, device=x.device)
        weights = torch.empty(T, K, dtype=torch.float32, device=x.device)
        slots = None if self._slots is None else self._slots.rows(T)
        places = ids if slots is None else torch.empty_like(ids)
        topk(
            logits, ids, weights, renormalize=moe.router.renormalize, lengths=lengths, slots=slots, slot_ids=places,
            pdl=pdl,
        )  # fmt: skip
        return ids, weights, places

    def _experts(self, moe: MoEBlock, normed: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """What each chosen expert here makes of its rows, already weighted: [T K, H], some rows of it not written."""
        (T, K), experts = places.shape, moe.experts
        S, y = experts.num_slots, normed.new_empty(places.numel(), experts.hidden_size)
        if S == 0:
            return y
        rows = torch.empty(S, T, dtype=torch.int32, device=places.device)
        counts = torch.empty(S, dtype=torch.int32, device=places.device)
        hidden = normed.new_empty(T * K, experts.width)
        group_by_expert(places, S, rows, counts, pdl=self._pdl)
        compute_grouped(self._tiles, experts, normed, rows, counts, weights, hidden, y, pdl=self._pdl)
        return y


def _linear(x: Tensor, weight: Tensor, added: Tensor | None, out: Tensor) -> None:
    """out [T, N] = x weight^T + added, rounded once; out may be columns of another."""
    if added is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(added, x, weight.t(), out=out)


class PromptDecoder:
    """Computes prompts of a loaded Decoder, all of whose layers are here; see `DevicePrompts`."""

    def __init__(
        self, model: Decoder, max_position: int, device: torch.device, table: TileTable | None = None, *,
        pdl: bool | None = None, hopper: HopperKernels | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        """table: measured tiles; None: the package's and the user's for this GPU. pdl: as for `FusedDecoder`.

        hopper: None for the kernels that serve the model on this GPU. whole: the last layer computes all rows, like
        the others, for those who time a layer.
        """
        fix_cache_keys()
        self._model, dtype = model, model.norm.weight.dtype
        layers, local = model.decoder_layers, model.mesh.shard(model.config).local
        can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
        self._pdl = can if pdl is None else pdl
        hopper = hopper or hopper_kernels(device, local, dtype)
        if model.mesh.plan.moves_tokens:  # to experts that their own backend computes
            hopper = HopperKernels(hopper.attention)
        tiles = StepTiles(tiles_for(device) if table is None else table, local, dtype, hopper.products)
        following = [*(layer.input_norm for layer in layers[1:]), model.norm]
        self._first = layers[0].input_norm
        # Where ranks share the vocabulary, its own module looks up what is here, and adds up.
        self._table = model.embed_tokens.table() if model.mesh.tp.size == 1 else None
        self._layers = [
            PromptLayer(layer, norm, tiles, model.mesh, dtype, hopper.attention, pdl=self._pdl)
            for layer, norm in zip(layers, following, strict=True)
        ]
        cos, sin = rotary_tables(model.config.attention.rope, max_position)
        self._cos, self._sin = cos.to(device), sin.to(device)
        self.hopper = hopper
        # Of tokens that travel other ranks are told how many come: as many in each layer.
        self._cuts_last = not whole and not self._layers[-1].travels
        triton = default_tile(model.config.attention.head_dim, dtype)
        self.block_rows = triton.rows if hopper.attention is None else hopper.attention.rows

    def logits(
        self, rows: PromptRows, cache: KVCache, probe: Probe | None = None, most_rows: int | None = None
    ) -> Tensor:
        """See `DevicePrompts`."""
        x, normed, places = self._begin(rows)
        seen, wanted, lengths = Seen(probe, x), rows.sample_rows, places.lengths
        count, cuts = len(wanted), self._cuts_last and probe is None  # a probe sees all rows of all layers
        seen.record("embedding", -1, x)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            cut = cuts and layer is self._layers[-1]
            if cut and (more := power_of_two(count) - count if count else 0):
                # To a power of two, lest each number of samples have kernels of its own.
                wanted = torch.cat((wanted, wanted[-1:].expand(more)))
            queries = wanted if cut else None
            attended = layer.attend(normed, rows, places, self._cos, self._sin, layer_cache, queries)
            if cut:
                if not count:
                    return self._model.head(normed[:0])
                x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
                lengths = None if lengths is None else lengths.index_select(0, wanted)
            normed = layer.project(x, attended)
            seen.added("attention", layer.index)
            normed = layer.feed(x, normed, lengths, seen, most_rows)
            seen.added(layer.stage, layer.index)
            seen.record("layer", layer.index, x)
        logits = self._model.head(normed[:count] if cuts else normed.index_select(0, wanted))
        seen.record("logits", -1, logits)
        return logits

    def choose(self, logits: Tensor, out: Tensor) -> None:
        """See `DevicePrompts`."""
        scratch = out.new_empty(argmax.scratch_words(*logits.shape))
        argmax.greedy(logits, out, scratch, pdl=self._pdl)

    def _begin(self, rows: PromptRows) -> tuple[Tensor, Tensor, RowPlaces]:
        """The residual stream, fp32 [T, H], the rows normed for the first layer, and where they are."""
        token_ids, norm, table = rows.token_ids, self._first, self._table
        embeddings: Tensor = self._model.embed_tokens(token_ids) if table is None else table
        normed = embeddings.new_empty(len(token_ids), self._model.config.hidden_size)
        x = torch.empty_like(normed, dtype=torch.float32)
        places = begin_rows(
            token_ids, embeddings, norm.weight.data, norm.eps, rows.spans, x, normed,
            by_token=table is not None, padded=rows.padded,
        )  # fmt: skip
        return x, normed, places

    def assist(self, most_rows: int | None) -> Tensor:
        """See `DevicePrompts`."""
        weight = self._model.norm.weight
        for layer in self._layers:
            if layer.travels:
                assert layer.layer.moe is not None
                layer.layer.moe(weight.new_empty(0, self._model.config.hidden_size), None, most_rows)
        return weight.new_empty(0, self._model.config.vocab_size)
