"""Embedding: a row of the table for each token; with several ranks, each holds some rows of the table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.parallel.comm import Group


class Embedding(nn.Module):
    """token_ids [T] -> [T, H]."""

    def __init__(
        self,
        vocab: range,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        """vocab: the tokens whose rows are here; those of all ranks of the group are the whole vocabulary."""
        super().__init__()
        self._vocab = vocab
        self._group = None if group is None or group.size == 1 else group
        weight = torch.empty(len(vocab), hidden_size, dtype=dtype, device=device)
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.quantized: QuantizedMatrix | None = None
        self._dtype = dtype

    def quantize(self, bits: int) -> None:
        """Hold the table in so many bits, before it is loaded."""
        assert self.weight is not None
        self.quantized = QuantizedMatrix.empty(self.weight.shape, bits)
        self.weight = None

    def table(self) -> Tensor:
        """The rows that are here, [v, H], in the model's dtype."""
        if self.quantized is not None:
            return self.quantized.dequantize(self._dtype)
        assert self.weight is not None
        return self.weight.data

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.quantized is not None:
            return self.quantized[token_ids].dequantize(self._dtype)
        assert self.weight is not None
        if self._group is None:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self._vocab.start
        elsewhere = (local < 0) | (local >= len(self._vocab))
        rows = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self._group.all_reduce(rows.masked_fill_(elsewhere[:, None], 0), "embedding")
