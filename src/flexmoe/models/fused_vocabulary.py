"""Both ends of a fused decode step, which know words: embedding, and the choice of tokens.

Enters: the rows' tokens; logits. Leaves: the residual stream; sampled tokens. Where ranks share the vocabulary, each
looks up and computes what is there of it. Greedy rows then exchange one candidate each, drawn ones their logits; every
rank makes the same choice, so that the next step can begin with tokens that only the devices know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.triton import argmax, sample
from flexmoe.kernels.triton.embed import embed
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import DeviceRows, Sampling
from flexmoe.models.fused_ranks import SharedSums


class Vocabulary:
    """The words of a model, P ranks holding v = ceil(V / P) of them each, the last ones maybe fewer.

    part: this rank's logits, fp32 [max_rows, v]. whole: logits fp32 [max_rows, V], the same memory on one rank; on
    several only filled by `gather`. sampled: int64 [max_rows], the latest tokens.
    """

    def __init__(
        self, model: Decoder, sums: SharedSums | None, device: torch.device, max_rows: int, *, pdl: bool
    ) -> None:
        """sums: None for one rank."""
        mesh, size = model.mesh, model.config.vocab_size
        self._table, self._sums, self._group, self._pdl = model.embed_tokens.table(), sums, mesh.tp, pdl
        self._here = mesh.shard(model.config).vocab
        width = -(-size // mesh.tp.size)
        self.part = torch.empty(max_rows, width, dtype=torch.float32, device=device)
        self._rows = self.part if mesh.tp.size == 1 else self.part.new_empty(max_rows, mesh.tp.size * width)
        self.whole = self._rows[:, :size]
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        steps = range(1, max_rows + 1)
        words = max(max(argmax.scratch_words(t, size), sample.scratch_words(t, size)) for t in steps)
        self._scratch = torch.empty(words, dtype=torch.int64, device=device)

    def embed(self, rows: DeviceRows, x: Tensor, chosen: Tensor) -> None:
        """x [T, H] fp32 = the embeddings of the rows' tokens, and chosen [T] these tokens."""
        given = rows.token_ids, rows.sources, self.sampled, self._table
        if self._sums is None:
            embed(*given, x, chosen, pdl=self._pdl)
            return
        self._sums.start()
        embed(*given, self._sums.part(len(x)), chosen, first=self._here.start, pdl=self._pdl)
        self._sums.begin(x)

    def sample(self, rows: int, sampling: Sampling | None) -> None:
        """Choose the rows' tokens by the logits in `part`; the likeliest without `sampling`."""
        out = self.sampled[:rows]
        if sampling is not None:
            logits, params = self.gather(rows), sampling.params
            sample.sample(logits, params, out, self._scratch, filtered=sampling.filtered, pdl=self._pdl)
        elif self._group.size == 1:
            argmax.greedy(self.whole[:rows], out, self._scratch, pdl=self._pdl)
        else:
            own = self.part[:rows, : len(self._here)]
            argmax.best(own, out, self._scratch, first=self._here.start, pdl=self._pdl)
            found = self._group.all_gather(out, "logits").view(-1, rows)  # [P, T]
            argmax.winner(found, out)

    def gather(self, rows: int) -> Tensor:
        """The rows' logits [T, V], of all ranks."""
        if self._group.size > 1:
            parts = self._group.all_gather(self.part[:rows], "logits").view(self._group.size, rows, -1)  # [P, T, v]
            self._rows[:rows].view(rows, self._group.size, -1).copy_(parts.transpose(0, 1))
        return self.whole[:rows]
