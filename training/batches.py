"""Draws training windows from the token arrays, and cuts the validation arrays into windows.

In: the data folder of `training.prepare`. Out: tensors of ids [B, T + 1] on the training device. All tokens stay on
the device (about 75 MB), so that a batch is one gather and no worker has to feed it.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.chat import BOS, SPECIAL_TOKENS
from training.corpus import GROUPS

# Shares of the windows of a batch, in the order of GROUPS: for most of a phase, and for its last fifth.
MIXES = {
    "main": ((0.37, 0.19, 0.30, 0.13, 0.01), (0.28, 0.15, 0.24, 0.29, 0.04)),
    "finish": ((0.22, 0.13, 0.11, 0.50, 0.04), (0.22, 0.13, 0.11, 0.50, 0.04)),
}
LATE_FROM = 0.8
# Share of a group's windows that start where a document starts, as prompts do; chats always do.
_ALIGNED = (0.25, 0.25, 0.25, 1.0, 1.0)
VALIDATION_GROUPS = {
    "fiction": ("se-books",),
    "prose": ("austen", "moby-dick", "wiki-vital", "sotu", "factbook"),
    "qa": ("qa-wiki", "qa-factbook", "qa-wordnet", "qa-pydoc", "qa-chatterbot"),
}  # every other source belongs to "docs"


class Sampler:
    """Random windows from a mix of groups; `state` and `restore` make its draws resumable."""

    def __init__(self, folder: Path, mix: str, length: int, device: torch.device, seed: int) -> None:
        arrays = [np.load(folder / f"train-{group}.npy") for group in GROUPS]
        self.mixes, self.length = MIXES[mix], length
        self.tokens = _on_device(np.concatenate(arrays), device)
        starts = (self.tokens == SPECIAL_TOKENS.index(BOS)).nonzero().flatten()
        self.document_starts = starts
        ends = torch.tensor(np.cumsum([len(array) for array in arrays]), device=device)
        sizes = torch.tensor([len(array) for array in arrays], device=device)
        self.first, self.room = ends - sizes, sizes - length - 1  # [G]
        if int(self.room.min()) <= 0:
            raise ValueError(f"each group needs more than {length + 1} tokens, the smallest has {int(sizes.min())}")
        self.aligned = torch.tensor(_ALIGNED, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, count: int, progress: float) -> Tensor:
        """`count` windows of length + 1 ids; `progress` (0 to 1) chooses the mix."""
        device = self.tokens.device
        mix = torch.tensor(self.mixes[progress >= LATE_FROM], device=device)
        group = torch.multinomial(mix, count, replacement=True, generator=self.generator)
        where, align = torch.rand(2, count, device=device, dtype=torch.float64, generator=self.generator)
        start = self.first[group] + (where * self.room[group]).long()
        begin = self.document_starts[torch.searchsorted(self.document_starts, start, right=True) - 1]
        start = torch.where(align < self.aligned[group], begin, start)
        return self.tokens[start[:, None] + torch.arange(self.length + 1, device=device)].long()

    def state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Goes on from a saved `state`."""
        self.generator.set_state(state)


def validation_windows(folder: Path, length: int, device: torch.device) -> dict[str, Tensor]:
    """Windows [N, length + 1] of each group's held-out text, without overlap of the predicted tokens."""
    grouped: dict[str, list[np.ndarray]] = {"fiction": [], "prose": [], "docs": [], "qa": []}
    for path in sorted(folder.glob("validation-*.npy")):
        source = path.stem.removeprefix("validation-")
        group = next((name for name, members in VALIDATION_GROUPS.items() if source in members), "docs")
        grouped[group].append(np.load(path))
    windows = {}
    for group, arrays in grouped.items():
        tokens = _on_device(np.concatenate(arrays), device).long()
        windows[group] = tokens.unfold(0, length + 1, length)
    return windows


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int16)).to(device)
