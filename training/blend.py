"""Averages two checkpoints of the same shape, to see whether a point between two phases keeps the virtues of both.

In: two checkpoint folders and the share of the second one. Out: a checkpoint folder, tokenizer included.
Run: python -m training.blend --first MAIN --second FINISH --share 0.5 --output FOLDER
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def blend(first: Path, second: Path, share: float, output: Path) -> None:
    """Writes (1 - share) * first + share * second, computed in fp32, in the type of the first."""
    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    if left.keys() != right.keys():
        raise ValueError(f"{first} and {second} have different tensors: {sorted(left.keys() ^ right.keys())[:3]} ...")
    mixed = {
        name: ((1 - share) * tensor.float() + share * right[name].float()).to(tensor.dtype).contiguous()
        for name, tensor in left.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(mixed, output / "model.safetensors", metadata={"format": "pt"})
    for path in second.glob("*.json"):
        shutil.copy(path, output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--second", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--share", type=float, required=True, help="weight of the second, 0 to 1")
    parser.add_argument("--output", type=Path, required=True, help="folder for the blend")
    args = parser.parse_args()
    blend(args.first, args.second, args.share, args.output)


if __name__ == "__main__":
    main()
