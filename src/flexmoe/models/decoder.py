"""The one decoder: a pre-norm transformer described by a ModelConfig.

Enters: a ForwardBatch and the KV cache. Leaves: hidden states [T, H], and logits [N, V] for the rows asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.cpu.decode import LayerWeights, OuterWeights
from flexmoe.kernels.quantize import QuantizedMatrix, Weights
from flexmoe.layers.attention import Attention
from flexmoe.layers.embedding import Embedding
from flexmoe.layers.forward_batch import ForwardBatch
from flexmoe.layers.kv_cache import KVCache
from flexmoe.layers.large_pages import move_to_large_pages
from flexmoe.layers.linear import Linear
from flexmoe.layers.mlp import GatedMLP
from flexmoe.layers.norm import RMSNorm
from flexmoe.layers.rotary import Rotary, inverse_frequencies
from flexmoe.models.native import NativeDecoder, layer_weights, most_rows, screen_of, takes_prompts, weight_of
from flexmoe.models.quantized import bits_of
from flexmoe.moe.block import MoEBlock
from flexmoe.moe.experts.weights import ExpertWeights
from flexmoe.parallel.mesh import Mesh


class DecoderLayer(nn.Module):
    """norm -> attention -> add, norm -> MoE block or dense MLP -> add."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        mesh: Mesh,
        backend: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """config: of the whole model, whose layer number `index` this is; the rank's share of it is made."""
        super().__init__()
        shard = mesh.shard(config)
        layer, config = config.layers[index], shard.local
        self.index = index
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.attention = Attention(
            config, layer.window, dtype=dtype, device=device, group=mesh.tp, kv_replicas=shard.kv_replicas
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.moe: MoEBlock | None = None
        self.mlp: GatedMLP | None = None
        if layer.is_moe and config.moe is not None:
            placement = mesh.plan.placement(config.moe.num_experts, index)
            self.moe = MoEBlock(config, index, placement, backend, dtype=dtype, device=device, mesh=mesh)
        else:
            width, bias = config.dense_width, config.dense_bias
            self.mlp = GatedMLP(config.hidden_size, width, bias=bias, dtype=dtype, device=device, summed=mesh.tp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
        attended = self.attention(self.input_norm(x), cos, sin, cache, batch)
        self._record(batch, "attention", attended)
        x = x + attended
        normed = self.mlp_norm(x)
        fed = self.mlp(normed) if self.moe is None else self.moe(normed, batch.probe, batch.most_rows)  # type: ignore[misc]
        self._record(batch, "mlp" if self.moe is None else "moe", fed)
        x = x.add_(fed)
        self._record(batch, "layer", x)
        return x

    def native(self) -> LayerWeights:
        """This layer's loaded weights for the C kernels."""
        return layer_weights(self.input_norm, self.attention, self.mlp_norm, self.moe, self.mlp)

    def _record(self, batch: ForwardBatch, stage: str, tensor: Tensor) -> None:
        if batch.probe is not None:
            batch.probe.record(stage, self.index, tensor)


class Decoder(nn.Module):
    """Embedding, layers, final norm and language-model head.

    Of several pipeline stages each has its layers, numbered as in the whole model; the first has the embedding, the
    last norm and head. On the others an embedding or norm has no weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: ParallelPlan,
        backend: str,
        max_position: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        mesh: Mesh | None = None,
    ) -> None:
        """max_position: how many positions the rotary tables cover; the rest describes the parts.

        config: of the whole model. mesh: this rank's place in the plan; None for a plan of one rank.
        """
        super().__init__()
        self.config = config
        self.mesh = mesh or Mesh(plan)
        self.pipeline = self.mesh.pipeline
        shard, hidden = self.mesh.shard(config), config.hidden_size
        self.embed_tokens = Embedding(shard.embedding, hidden, dtype=dtype, device=device, group=self.mesh.tp)
        self.decoder_layers = [
            DecoderLayer(config, i, self.mesh, backend, dtype=dtype, device=device) for i in shard.layers
        ]
        self.layers = nn.ModuleList()
        for layer in self.decoder_layers:
            self.layers.add_module(str(layer.index), layer)
        self.norm = RMSNorm(len(shard.final_norm), config.norm_eps, dtype=dtype, device=device)
        self.lm_head: Linear | None = None
        if shard.head and not config.tie_embeddings:
            self.lm_head = Linear(hidden, len(shard.head), bias=False, dtype=dtype, device=device)
        self.native: NativeDecoder | None = None
        self.rotary = Rotary(config.attention.rope, max_position, dtype=dtype, device=device)

    def quantize(self, quantization: str) -> None:
        """Hold the weights that models/quantized.py names in few bits; before loading, so no memory is touched."""
        for name, module in list(self.named_modules()):
            if isinstance(module, (Linear, Embedding, ExpertWeights)):
                held = f"{name}.gate_up" if isinstance(module, ExpertWeights) else f"{name}.weight"
                bits = bits_of(held, quantization)
                if bits is not None:
                    module.quantize(bits)

    def move_to_large_pages(self) -> None:
        """Hold all weights side by side on large pages, before they are loaded; for who reads them where they are."""
        tensors: list[Tensor] = list(self.parameters())
        for matrix in self.weights().values():
            if isinstance(matrix, QuantizedMatrix):
                tensors += (matrix.codes, matrix.scales)
        move_to_large_pages(tensors)

    def weights(self) -> dict[str, Weights]:
        """Everything to be loaded, by name: parameters and quantized matrices."""
        found: dict[str, Weights] = {name: parameter.data for name, parameter in self.named_parameters()}
        for name, module in self.named_modules():
            if isinstance(module, ExpertWeights):
                found |= {f"{name}.{stack}": matrix for stack, matrix in module.quantized.items()}
            elif isinstance(module, (Linear, Embedding)) and module.quantized is not None:
                found[f"{name}.weight"] = module.quantized
        return found

    def pack(self, native_threads: int | None = None, *, isa: str = "auto", in_place: bool = False) -> None:
        """Make the loaded weights ready for use; called once.

        native_threads: decode in the C kernels with so many threads, in those for `isa`. in_place: other kernels read
        the weights. Both as they were loaded; without either, each part may choose a layout of its own.
        """
        prepack = native_threads is None and not in_place
        for module in list(self.modules()):
            if isinstance(module, (Linear, ExpertWeights)):
                module.pack(prepack=prepack)
        if native_threads is not None:
            layers = [layer.native() for layer in self.decoder_layers]
            quantized = self.embed_tokens.quantized is not None
            dtype = self.norm.weight.dtype
            prompts = takes_prompts(dtype, isa, quantized=quantized)
            max_rows = most_rows(self.config, dtype, quantized=quantized, prompts=prompts)
            outer = self._outer_weights()
            self.native = NativeDecoder(layers, outer, native_threads, max_rows, isa, prompts=prompts)

    def _outer_weights(self) -> OuterWeights:
        embedding = weight_of(self.embed_tokens)
        head = embedding if self.lm_head is None else weight_of(self.lm_head)
        frequencies, scale = inverse_frequencies(self.config.attention.rope)
        norm = self.norm.weight.data
        return OuterWeights(embedding, head, norm, self.norm.eps, frequencies, scale, screen_of(head))

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [T, H] after the final norm; writes the rows' keys and values into the cache.

        On a stage that is not the last: after its own layers, when the stage behind has them.
        """
        x = self._enter(batch)
        cos, sin = self.rotary(batch.positions)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, cos, sin, layer_cache, batch)
        if not self.pipeline.is_last:
            self.pipeline.hand_on(x)
            return x
        return self.norm(x)  # type: ignore[no-any-return]

    def _enter(self, batch: ForwardBatch) -> Tensor:
        """What the stage's first layer reads [T, H]: embeddings, or the rows of the stage before."""
        if not self.pipeline.is_first:
            shape = (batch.token_ids.shape[0], self.config.hidden_size)
            return self.pipeline.receive(self.norm.weight.new_empty(shape))
        x: Tensor = self.embed_tokens(batch.token_ids)
        if batch.probe is not None:
            batch.probe.record("embedding", -1, x)
        return x

    def logits(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """Logits [N, V] of the batch's sample rows, in the model's dtype; [0, V] on ranks that do not sample."""
        if not self.pipeline.is_last:
            return hidden.new_empty(0, self.config.vocab_size)
        if batch.sample_rows is not None:
            hidden = hidden.index_select(0, batch.sample_rows)
        logits = self.head(hidden)
        if batch.probe is not None:
            batch.probe.record("logits", -1, logits)
        return logits

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of rows [N, H] after the final norm; [0, V] on ranks that do not sample."""
        logits: Tensor = F.linear(hidden, self.embed_tokens.table()) if self.lm_head is None else self.lm_head(hidden)
        return logits if self.mesh.tp.size == 1 else self._whole_rows(logits)

    def _whole_rows(self, part: Tensor) -> Tensor:
        """Logits [N, V] on the first rank of each part [N, v], the last of which may be shorter; elsewhere [0, V]."""
        size = -(-self.config.vocab_size // self.mesh.tp.size)
        parts = self.mesh.tp.gather(F.pad(part, (0, size - part.shape[1])), "logits")  # [P, N, v]
        if parts is None:
            return part.new_empty(0, self.config.vocab_size)
        return parts.transpose(0, 1).flatten(1)[:, : self.config.vocab_size]
