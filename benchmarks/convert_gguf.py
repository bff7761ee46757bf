"""A Mixtral checkpoint as GGUF files for llama.cpp: `python benchmarks/convert_gguf.py FOLDER OUT.bf16.gguf ...`.

The end of a file's name says its number format: .f32.gguf, .bf16.gguf or .q8_0.gguf.

Only what the comparison needs: no tokenizer, plain rotary positions, no window. It needs `pip install gguf`. As in
files of llama.cpp's own converter norms and routers are fp32 whatever the type, and the rows of the query and key
projections lie in another order, since it rotates neighbours where the checkpoint's model rotates halves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import torch
from torch import Tensor

from flexmoe.config.engine import LoadConfig
from flexmoe.config.model import ModelConfig
from flexmoe.models import families
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def convert(folder: Path, files: Sequence[Path]) -> None:
    """Write each file in the format that its name ends with. Raises ValueError for a model that is no plain Mixtral."""
    source = open_model(LoadConfig(model=str(folder)))
    config = source.config
    _check(config)
    whole = {name: torch.empty(p.shape, dtype=torch.float32) for name, p in families.parameters(config).items()}
    load_weights(source, whole)
    for file in files:
        _write(file, config, whole)


def _write(out: Path, config: ModelConfig, whole: dict[str, Tensor]) -> None:
    matrix_type, file_type = TYPES[out.suffixes[-2].removeprefix(".")]
    writer = gguf.GGUFWriter(out, "llama")
    _describe(writer, config, file_type)
    for name, tensor in _tensors(config, whole):
        wide = tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight")
        number = gguf.GGMLQuantizationType.F32 if wide else matrix_type
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: ModelConfig) -> None:
    plain = config.family == "mixtral" and config.attention.rope.kind == "default" and not config.tie_embeddings
    if not plain or any(layer.window for layer in config.layers):
        raise ValueError(
            "only a Mixtral model with plain rotary positions, no window and a head of its own is converted."
        )


def _describe(writer: gguf.GGUFWriter, config: ModelConfig, file_type: gguf.LlamaFileType) -> None:
    a, moe = config.attention, config.moe
    assert moe is not None
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(moe.expert_width)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(a.rope.theta)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _tensors(config: ModelConfig, whole: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "token_embd.weight", whole["embed_tokens.weight"]
    yield "output_norm.weight", whole["norm.weight"]
    yield "output.weight", whole["lm_head.weight"]
    a = config.attention
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        rows = [n * a.head_dim for n in (a.num_heads, a.num_kv_heads, a.num_kv_heads)]
        query, key, value = whole[ours + "attention.qkv.weight"].split(rows)
        gate, up = whole[ours + "moe.experts.gate_up"].chunk(2, 1)  # [E, F, H]
        yield theirs + "attn_norm.weight", whole[ours + "input_norm.weight"]
        yield theirs + "attn_q.weight", _neighbours(query, a.num_heads)
        yield theirs + "attn_k.weight", _neighbours(key, a.num_kv_heads)
        yield theirs + "attn_v.weight", value
        yield theirs + "attn_output.weight", whole[ours + "attention.out.weight"]
        yield theirs + "ffn_norm.weight", whole[ours + "mlp_norm.weight"]
        yield theirs + "ffn_gate_inp.weight", whole[ours + "moe.router.weight"]
        yield theirs + "ffn_gate_exps.weight", gate
        yield theirs + "ffn_up_exps.weight", up
        yield theirs + "ffn_down_exps.weight", whole[ours + "moe.experts.down"]


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of each head side by side, [heads * D, H]."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("files", type=Path, nargs="+", help="files to write, e.g. model.q8_0.gguf")
    args = parser.parse_args()
    convert(args.folder, args.files)


if __name__ == "__main__":
    main()
