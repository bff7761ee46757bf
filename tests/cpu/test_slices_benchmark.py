"""benchmarks/slices.py without a GPU: the shapes of shares, whose choices, and what a share computes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe.models.presets import PRESETS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("slices")


def test_without_a_gpu_it_says_so_in_one_line(slices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^benchmarks/slices.py times kernels on an NVIDIA GPU, .* none here\.$"):
        slices.main(["olmoe-1b-7b"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_share_is_a_part_of_the_whole(slices: Any, name: str) -> None:
    config = PRESETS[name].config
    whole, *parts = slices.shares(config, [1, 2, 4, 8])
    assert (whole.slots, whole.width) == (config.moe.num_experts, config.moe.expert_width)
    for share in parts:
        if share.strategy == "tensor":
            assert (share.slots, share.width) == (whole.slots, whole.width // share.degree)
        else:
            assert (share.slots, share.width) == (-(-whole.slots // share.degree), whole.width)
        if whole.slots % share.degree == 0:
            assert share.weight_bytes(config, 2) * share.degree == whole.weight_bytes(config, 2)
    assert {(s.strategy, s.degree) for s in parts} == {
        (strategy, degree)
        for strategy in ("tensor", "expert")
        for degree in (2, 4, 8)
        if strategy == "tensor" or degree <= whole.slots
    }


def test_bytes_of_mixtral(slices: Any) -> None:
    config = PRESETS["mixtral-8x7b"].config
    shares = {(s.strategy, s.degree): s for s in slices.shares(config, [1, 8])}
    assert shares["tensor", 8].weight_bytes(config, 2) == 8 * 3 * 1792 * 4096 * 2
    assert shares["expert", 8].weight_bytes(config, 2) == 1 * 3 * 14336 * 4096 * 2


def test_sets_of_weights_exceed_the_cache(slices: Any) -> None:
    config = PRESETS["olmoe-1b-7b"].config
    for share in slices.shares(config, [1, 2, 4, 8]):
        for batch in (1, 32, 512):
            sets = slices.num_sets(share, config, batch, 2)
            read = share.weight_bytes(config, 2) * slices.touched(share, config, batch) / share.slots
            assert sets == 16 or sets * read >= slices._CACHE
            assert 2 <= sets <= 16


def test_choices_are_the_busiest_ranks(slices: Any) -> None:
    share = next(s for s in slices.shares(PRESETS["mixtral-8x7b"].config, [4]) if s.strategy == "expert")
    ids = torch.tensor([[4, 0], [5, 4], [7, 5]])  # of ranks 2, 0; 2, 2; 3, 2
    renamed = slices.busiest_first(ids, share)
    assert renamed.tolist() == [[0, 4], [1, 0], [3, 1]]
    assert int((renamed < 2).sum()) == 4


@pytest.mark.parametrize("strategy", ["tensor", "expert"])
def test_a_share_computes_its_part(slices: Any, strategy: str) -> None:
    """On a small model of Mixtral's kind with the reference backend; the kernels have tests of their own."""
    config = PRESETS["mixtral-8x7b"].config
    assert config.moe is not None
    config = replace(config, hidden_size=64, moe=replace(config.moe, expert_width=64))
    share = next(s for s in slices.shares(config, [4]) if s.strategy == strategy)
    blocks = [slices.make_block(config, share, "reference", torch.float32, CPU) for _ in range(2)]
    layer = slices.Layer(config, share, 3, blocks, torch.randn(3, 64))
    for _ in range(2):  # a second time the routers are replaced already
        whole = [run() for run in layer.block()]
    assert not torch.equal(*whole)  # each has weights of its own
    for out, run in zip(whole, layer.grouped(), strict=True):
        assert out.shape == (3, 64)
        torch.testing.assert_close(run(), out)
    facts = layer.facts()
    assert facts["pairs"] == (6 if strategy == "tensor" else int((layer.ids < 2).sum()))
    assert 0 < facts["active_experts"] <= share.slots
