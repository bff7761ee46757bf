"""Tiny random checkpoints of every family, written by transformers, so that each test compares with the real thing.

`CASES` names them. `make(case, folder)` writes config.json, generation_config.json, safetensors and a small
tokenizer; `tiny(name)` does the same in a temporary folder kept for the whole test session. Weights are random and
seeded by the case's name; norms and biases are random too, so that a swapped or forgotten one shows.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Layout = Literal["saved", "per_expert", "fused"]
Spelling = Literal["new", "old"]

VOCAB = 320
SHARD = "120KB"
_TEXT = (
    "The mixture of experts routes each token to a few experts, and their answers are weighed and summed. "
    "A router that sends every token to one expert has learnt nothing; one that spreads them learns to choose. "
)


@dataclass(frozen=True)
class Case:
    """One tiny model: the transformers model_type and what its config differs in from `_BASE`."""

    name: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments of the family's transformers config class."""
        return {**_BASE, **_FAMILY.get(self.model_type, {}), **self.options}

    @property
    def is_moe(self) -> bool:
        return self.model_type in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 80,
        "num_hidden_layers": 4,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},
}


def _rope(kind: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_LLAMA3 = _rope(
    "llama3",
    500000.0,
    factor=8.0,
    original_max_position_embeddings=32,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
_LIST = [
    Case("mixtral", "mixtral"),
    Case("mixtral-window", "mixtral", {"sliding_window": 8, "head_dim": 32}),
    Case("mixtral-tied", "mixtral", {"tie_word_embeddings": True, **_rope("default", 500.0)}),
    Case("olmoe", "olmoe", {"num_key_value_heads": 4}),
    Case("olmoe-odd", "olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True, "attention_bias": True}),
    Case("qwen2_moe", "qwen2_moe"),
    Case("qwen2_moe-sparse", "qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    Case(
        "qwen2_moe-odd",
        "qwen2_moe",
        {"mlp_only_layers": [1], "qkv_bias": False, "use_sliding_window": True, "sliding_window": 8}
        | {"max_window_layers": 3},
    ),
    Case("qwen3_moe", "qwen3_moe", {"norm_topk_prob": True}),
    Case("qwen3_moe-odd", "qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True, **_YARN}),
    Case("qwen3_moe-window", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    Case("llama", "llama"),
    Case("llama-mha-bias", "llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    Case("llama-tied-llama3", "llama", {"tie_word_embeddings": True, "head_dim": 32, **_LLAMA3}),
    Case("llama-linear", "llama", _rope("linear", factor=4.0)),
    Case("llama-dynamic", "llama", {"max_position_embeddings": 16, **_rope("dynamic", factor=4.0)}),
    Case("mistral", "mistral"),
    Case("mistral-window", "mistral", {"sliding_window": 8, "head_dim": 32}),
    Case("qwen2", "qwen2", {"tie_word_embeddings": True}),
    Case(
        "qwen2-window",
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    Case("qwen3", "qwen3", {"tie_word_embeddings": True}),
    Case(
        "qwen3-odd",
        "qwen3",
        {"attention_bias": True, "num_hidden_layers": 3}
        | {"use_sliding_window": True, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | _rope(
            "yarn",
            1000.0,
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.8,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
]
CASES: dict[str, Case] = {case.name: case for case in _LIST}


def make(
    case: Case,
    folder: Path,
    dtype: str = "float32",
    sharded: bool = False,
    layout: Layout = "saved",
    spelling: Spelling = "new",
) -> Path:
    """Write the case's checkpoint to `folder` and return it.

    layout: "saved" leaves the expert tensors as save_pretrained wrote them; "per_expert" and "fused" force one form.
    spelling: "old" rewrites config.json with rope_theta, rope_scaling and torch_dtype (transformers 4).
    """
    import torch

    model = build(case)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD if sharded else "1GB")
    if layout != "saved" and case.is_moe:
        _change_layout(folder, layout)
    if spelling == "old":
        _use_old_spelling(folder)
    write_tokenizer(folder)
    return folder


def build(case: Case) -> Any:
    """The case's transformers model in fp32, on the CPU, in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(zlib.crc32(case.name.encode()))
    config = AutoConfig.for_model(case.model_type, **case.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 1 or "router" in name or name.endswith("mlp.gate.weight"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@functools.cache
def tiny(
    name: str,
    dtype: str = "float32",
    sharded: bool = False,
    layout: Layout = "saved",
    spelling: Spelling = "new",
) -> Path:
    """The checkpoint of `CASES[name]`, made once a test session. Read it, do not change it: see `copy_of`."""
    folder = _session() / f"{name}-{dtype}-{sharded}-{layout}-{spelling}"
    return make(CASES[name], folder, dtype, sharded, layout, spelling)


def copy_of(source: Path, folder: Path) -> Path:
    """A copy a test may damage."""
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of the folder's config.json (a value of `...` removes the key)."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}, indent=2))
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB tokens with <s> 0, </s> 1, <pad> 2 and a chat template."""
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return str(tokenizer.to_str())


@functools.cache
def _session() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="flexmoe-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _use_old_spelling(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2))


def _change_layout(folder: Path, layout: Layout) -> None:
    """Rewrite every shard into one file whose expert tensors are all fused, or all one by one."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = _fused(tensors) if layout == "fused" else _per_expert(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """Per-expert tensors stacked as `mlp.experts.gate_up_proj` [E, 2F, H] and `.down_proj` [E, H, F]."""
    import torch

    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for name in tensors.keys() - plain.keys():
        prefix, _, rest = name.partition(".experts.")
        expert, part, _ = rest.split(".")
        groups.setdefault(prefix, {}).setdefault(int(expert), {})[part] = tensors[name]
    for prefix, experts in groups.items():
        parts = [experts[i] for i in range(len(experts))]
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if "gate_proj" in parts[0] else ("w1", "w3", "w2")
        target = prefix.replace(".block_sparse_moe", ".mlp") + ".experts."
        plain[target + "gate_up_proj"] = torch.stack([torch.cat([p[gate], p[up]]) for p in parts])
        plain[target + "down_proj"] = torch.stack([p[down] for p in parts])
    return {name.replace(".block_sparse_moe.gate", ".mlp.gate"): tensor for name, tensor in plain.items()}


def _per_expert(tensors: dict[str, Any]) -> dict[str, Any]:
    """Fused tensors taken apart as `mlp.experts.N.{gate,up,down}_proj.weight`; others unchanged."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                stem = f"{name.removesuffix('gate_up_proj')}{i}"
                out |= {f"{stem}.gate_proj.weight": gate.clone(), f"{stem}.up_proj.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            out |= {f"{stem}{i}.down_proj.weight": down.clone() for i, down in enumerate(tensor)}
        else:
            out[name] = tensor
    return out
