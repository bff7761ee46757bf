"""Collectives on 2 and 4 ranks: what they give, and that they count what they send."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexmoe.config.plan import ParallelPlan
from flexmoe.parallel.beats import Beats
from flexmoe.parallel.comm import Group, Traffic
from flexmoe.parallel.pipeline import Pipeline
from tests.multi.pool import Pool
from tests.multi.worker import CPU, PoolWorker


def collectives(worker: PoolWorker, size: int) -> dict[str, Any]:
    """Every collective once, on numbers that tell the ranks apart."""
    group = worker.mesh_of(ParallelPlan(size)).tp
    rank = group.index
    x = torch.arange(6.0).view(3, 2) + 10 * rank
    send = [(rank + i) % 3 for i in range(size)]  # zeros among them
    rows = torch.full((sum(send), 2), float(rank))
    found: dict[str, Any] = {
        "all_reduce": group.all_reduce(x.clone(), "all_reduce"),
        "bfloat16": group.all_reduce(x.bfloat16().t(), "bfloat16"),  # not contiguous
        "all_gather": group.all_gather(x, "all_gather"),
        "reduce_scatter": group.reduce_scatter(x.repeat(size, 1), "reduce_scatter"),
        "gather": group.gather(x, "gather"),
        "broadcast": group.broadcast(x.clone(), 1, "broadcast"),
        "minimum": group.minimum(7 + (rank - 1) ** 2, CPU),
        "counts": group.exchange_counts(send, CPU, "counts"),
    }
    found["all_to_all"] = group.all_to_all(rows, send, found["counts"], "all_to_all")
    if rank == 0:
        group.send(x, 1, "send")
    elif rank == 1:
        found["received"] = group.receive(torch.empty(3, 2), 0, "receive")
    return {**found, "sent": group.traffic.take(), "beats": group.traffic.beats[0]}


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(pools: dict[int, Pool], size: int) -> None:
    found = pools[size].call(collectives, size=size)
    inputs = [torch.arange(6.0).view(3, 2) + 10 * rank for rank in range(size)]
    for rank, got in enumerate(found):
        total = sum(inputs[1:], inputs[0])
        assert torch.equal(got["all_reduce"], total)
        assert torch.equal(got["bfloat16"], total.t().bfloat16())
        assert torch.equal(got["all_gather"], torch.cat(inputs))
        assert torch.equal(got["reduce_scatter"], total)
        assert torch.equal(got["broadcast"], inputs[1])
        assert (got["gather"] is None) == (rank > 0)
        assert got["minimum"] == 7
        counts = [(other + rank) % 3 for other in range(size)]
        assert got["counts"] == counts
        senders = [float(other) for other, count in enumerate(counts) for _ in range(count)]
        assert got["all_to_all"].tolist() == [[sender, sender] for sender in senders]
        assert got["beats"] > 0
    assert torch.equal(found[0]["gather"], torch.stack(inputs))
    assert torch.equal(found[1]["received"], inputs[0])


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_counted(pools: dict[int, Pool], size: int) -> None:
    """24 bytes a tensor of 3 x 2 fp32."""
    for rank, got in enumerate(pools[size].call(collectives, size=size)):
        sent, others = got["sent"], size - 1
        to_others = sum((rank + i) % 3 for i in range(size) if i != rank)
        assert sent["all_reduce"] == 2 * others / size * 24
        assert sent["bfloat16"] == 2 * others / size * 12
        assert sent["all_gather"] == others * 24
        assert sent["reduce_scatter"] == others / size * (24 * size)
        assert sent["gather"] == (24 if rank else 0)
        assert sent["broadcast"] == (24 if rank == 1 else 0)
        assert sent["counts"] == others * 8
        assert sent["all_to_all"] == to_others * 8
        assert sent.get("send", 0) == (24 if rank == 0 else 0)


def test_one_rank_sends_nothing() -> None:
    group = Group()
    x = torch.randn(3, 2)
    assert group.all_reduce(x, "a") is x
    assert group.all_gather(x, "a") is x
    assert group.reduce_scatter(x, "a") is x
    assert group.all_to_all(x, [3], [3], "a") is x
    assert group.exchange_counts([3], CPU, "a") == [3]
    assert torch.equal(group.gather(x, "a"), x[None])  # type: ignore[arg-type]
    assert group.minimum(5, CPU) == 5
    assert group.traffic.sent == {}


def test_ranks_that_are_only_imagined_give_the_right_shapes() -> None:
    group = Group(4, 1)
    x = torch.randn(3, 2)
    assert group.all_reduce(x, "a").shape == (3, 2)
    assert group.all_gather(x, "a").shape == (12, 2)
    assert group.reduce_scatter(group.all_gather(x, "a"), "a").shape == (3, 2)
    assert group.all_to_all(x, [1, 1, 1, 0], [2, 0, 0, 3], "a").shape == (5, 2)
    assert group.gather(x, "a") is None
    assert group.traffic.sent["a"] > 0


def test_what_a_replayed_graph_sends_is_counted_each_time() -> None:
    """Capturing it sends nothing; each replay does what was seen meanwhile."""
    traffic = Traffic()
    traffic.count("linear", 8)
    with traffic.aside() as sent:
        traffic.count("linear", 4)
        traffic.count("combine", 2)
    assert sent == {"linear": 4, "combine": 2}
    assert traffic.sent == {"linear": 8}
    beats = traffic.beats[0]
    traffic.repeat(sent)
    traffic.repeat(sent)
    assert traffic.take() == {"linear": 16, "combine": 4}
    assert traffic.beats[0] > beats


def test_a_rank_s_counter_lasts_for_years() -> None:
    """It has 64 bits, and goes on to a milestone for each stage of each step: ten years with 1,000 steps a second."""
    with Beats.file(1) as file:
        beats = Beats(file, 1)
    group = Group(8, 7, traffic=Traffic(beats=beats.of(0)))
    group.traffic.reach(10 * 365 * 86_400 * 1000 * 8)
    with Pipeline(group).step():
        for _ in range(100_000):  # collectives of a step, more than any has
            group.traffic.count("much", 1.0)
        assert group.traffic.milestone == 10 * 365 * 86_400 * 1000 * 8 + 7
