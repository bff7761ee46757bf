"""Writes trained weights as a Hugging Face checkpoint, and reads them back.

In: the trainer's state file. Out: model.safetensors (bf16, Mixtral's tensor names), config.json and
generation_config.json in the output folder.
Run: python -m training.export --state RUN/state.pt --output src/flexmoe/assets/builtin
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.chat import BOS, EOS, PAD, SPECIAL_TOKENS
from training.model import Shape


def hugging_face_tensors(state: dict[str, Tensor], shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Training tensors under Mixtral's names, the dense expert matrices cut into experts."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith((".w1.weight", ".w2.weight", ".w3.weight")):
            prefix, matrix, _ = name.rsplit(".", 2)
            parts = tensor.chunk(shape.num_local_experts, 1 if matrix == "w2" else 0)
            for expert, part in enumerate(parts):
                tensors[f"model.{prefix}.experts.{expert}.{matrix}.weight"] = part
        else:
            tensors[f"model.{name}"] = tensor
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def read_checkpoint(folder: Path, shape: Shape) -> dict[str, Tensor]:
    """The inverse of `write`: a checkpoint's weights in fp32 under the training names."""
    saved = load_file(folder / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = defaultdict(lambda: [torch.empty(0)] * shape.num_local_experts)
    for name, tensor in saved.items():
        prefix, is_expert, rest = name.removeprefix("model.").partition(".experts.")
        if is_expert:
            expert, matrix = rest.removesuffix(".weight").split(".")
            parts[f"{prefix}.{matrix}.weight"][int(expert)] = tensor.float()
        else:
            tensors[prefix] = tensor.float()
    for name, experts in parts.items():
        tensors[name] = torch.cat(experts, 1 if name.endswith("w2.weight") else 0)
    return tensors


def configuration(shape: Shape, dtype: str = "bfloat16") -> dict[str, object]:
    """config.json; both spellings where transformers 4 and 5 read different ones (rope, dtype)."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **shape.as_dict(),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **_special_ids(),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _special_ids() -> dict[str, int]:
    names = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return {name: SPECIAL_TOKENS.index(token) for name, token in names.items()}


def write(state: dict[str, Tensor], shape: Shape, output: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the three files."""
    output.mkdir(parents=True, exist_ok=True)
    config = configuration(shape, str(dtype).removeprefix("torch."))
    save_file(hugging_face_tensors(state, shape, dtype), output / "model.safetensors", metadata={"format": "pt"})
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", {**_special_ids(), "do_sample": False, "max_new_tokens": 256})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="state.pt of a training run")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    args = parser.parse_args()
    saved = torch.load(args.state, map_location="cpu", weights_only=True)
    write(saved["model"], Shape(**saved["shape"]), args.output)


if __name__ == "__main__":
    main()
