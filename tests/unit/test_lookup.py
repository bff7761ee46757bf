"""Prices of operations: what was measured comes back, gaps follow the roofline, and what is far says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from flexmoe.config.machine import Exchange, Link, Machine, Sample
from flexmoe.planner.collectives import exchange_seconds
from flexmoe.planner.lookup import Lookup
from flexmoe.planner.operations import Beside, Operation, outlay, roofline

_SHIPPED = Machine.load("h200x64")
MACHINE = replace(_SHIPPED, links=tuple(replace(link, measured=()) for link in _SHIPPED.links))


def measured(ratio: Callable[[Operation], float], *operations: Operation, ranks: int = 1) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"fused.{o.name}", "bfloat16", int(o.rows), o.shape, ratio(o) * least(o), ranks) for o in operations
    )


def least(operation: Operation) -> float:
    return outlay("fused", operation, MACHINE.device, "bfloat16")


def test_roofline_of_each_operation_by_hand() -> None:
    device = replace(MACHINE.device, launch_s=0.0)
    weights = 3 * 8 * 2048 * 1024 * 2 + 8 * (4 * 2048 + 2 * 1024) * 2  # bytes of 8 experts, read for a row each
    experts = Operation("experts", 8, (8, 2048, 1024))
    assert roofline(experts, device, "bfloat16") == pytest.approx(weights / device.read_bandwidth)
    many = Operation("linear", 65536, (4096, 4096))
    assert roofline(many, device, "bfloat16") == pytest.approx(2 * 65536 * 4096**2 / device.flops("bfloat16"))
    cache = 64 * 128 * (2 * 1000 * 4 + 2 * 32) * 2  # 64 rows see 1000 keys of 4 heads; queries and results of 32
    assert roofline(Operation("attention", 64, (1000, 32, 4, 128)), device, "bfloat16") == pytest.approx(
        cache / device.read_bandwidth
    )
    assert roofline(many, device, "bfloat16", "int8") == roofline(many, device, "bfloat16")
    few = Operation("linear", 1, (4096, 4096))
    assert roofline(few, device, "bfloat16", "int8") / roofline(few, device, "bfloat16") == pytest.approx(
        8.5 / 16, 0.01
    )


def test_what_times_are_compared_to_by_hand() -> None:
    device = replace(MACHINE.device, launch_s=1e-6)
    even = Operation("linear", 300, (4096, 4096))
    reading = (4096**2 + 300 * 2 * 4096) * 2 / device.read_bandwidth
    computing = 2 * 300 * 4096**2 / device.flops("bfloat16")
    expected = 1e-6 + math.sqrt(reading**2 + computing**2)
    assert outlay("fused", even, device, "bfloat16") == pytest.approx(expected)
    assert 1 < expected / roofline(even, device, "bfloat16") < math.sqrt(2)


def test_paths_launch_and_move_more_than_the_operation() -> None:
    plain, normed = (Operation("prompt", 512, (0, 32, 8, 128, heads)) for heads in (0, 40))
    beside = plain.beside("torch")
    assert beside.launches == 6  # three rotate, two write to the cache, one copies what was attended
    assert beside.numbers == 512 * 128 * (7 * 40 + 4 * 8 + 2 * 32)
    assert normed.beside("torch").launches - beside.launches == 17
    assert normed.beside("torch").numbers - beside.numbers == 512 * 128 * 40 * 20
    assert normed.beside("prompts") == plain.beside("prompts") == Beside()
    long, short = (Operation("attention", 32, (keys, 32, 8, 128)).beside("torch").launches for keys in (256, 255))
    assert long - short == 31 * 3  # a row each, or all gathered
    assert Operation("router", 512, (64, 2048, 8)).beside("prompts").numbers == 512 * 2048 * 23


def test_a_model_without_norms_is_priced_by_one_that_has_them() -> None:
    """In torch, where each is launches of its own."""
    normed, plain = (Operation("prompt", 512, (0, 32, 4, 128, heads)) for heads in (36, 0))
    costs = [outlay("torch", operation, MACHINE.device, "bfloat16") for operation in (normed, plain)]
    sample = Sample("torch.prompt", "bfloat16", 512, normed.shape, 3 * costs[0])
    lookup = Lookup(replace(MACHINE, samples=(sample,)), "bfloat16")
    assert lookup.estimate("torch", plain).seconds == pytest.approx(3 * costs[1])
    assert costs[1] < 0.6 * costs[0]


def test_what_was_measured_comes_back() -> None:
    operations = [Operation("experts", rows, (min(rows, 60), 2048, 1024)) for rows in (8, 64, 512)]
    lookup = Lookup(replace(MACHINE, samples=measured(lambda o: 1 + o.rows / 100, *operations)), "bfloat16")
    for operation in operations:
        found = lookup.estimate("fused", operation)
        assert found.seconds == pytest.approx((1 + operation.rows / 100) * least(operation), rel=1e-3)
        assert not found.extrapolated


def test_between_two_the_ratio_is_between() -> None:
    ends = [Operation("linear", 16, (n, 4096)) for n in (2048, 8192)]
    lookup = Lookup(replace(MACHINE, samples=measured(lambda o: o.shape[0] / 2048, *ends)), "bfloat16")
    middle = Operation("linear", 16, (4096, 4096))
    found = lookup.estimate("fused", middle)
    assert 1.3 < found.seconds / least(middle) < 3
    assert not found.extrapolated


def test_a_trend_goes_on_within_what_was_measured() -> None:
    """Of ratios that grow with rows, not a mean of all."""
    rows = (1, 4, 16, 64)
    operations = [Operation("linear", n, (4096, 4096)) for n in rows]
    samples = measured(lambda o: 1 + math.log(o.rows) / 4, *operations)
    lookup = Lookup(replace(MACHINE, samples=samples), "bfloat16")
    for n in (2, 32):
        between = Operation("linear", n, (4096, 4096))
        found = lookup.estimate("fused", between)
        assert found.seconds / least(between) == pytest.approx(1 + math.log(n) / 4, rel=0.04)
    beyond = Operation("linear", 1024, (4096, 4096))
    assert lookup.estimate("fused", beyond).seconds <= 1.001 * (1 + math.log(64) / 4) * least(beyond)


def test_prompts_take_products_and_experts_as_torch_does_where_only_that_was_measured() -> None:
    linear = Operation("linear", 512, (4096, 4096))
    (sample,) = measured(lambda _: 2.0, linear)
    lookup = Lookup(replace(MACHINE, samples=(replace(sample, op="torch.linear"),)), "bfloat16")
    assert lookup.estimate("prompts", linear).seconds == pytest.approx(2 * least(linear))
    assert lookup.estimate("prompts", Operation("router", 512, (8, 4096, 2))).extrapolated


def test_a_head_is_priced_as_a_product_where_it_was_not_measured_itself() -> None:
    shape = (32000, 1024)
    (product,) = measured(lambda _: 2.0, Operation("linear", 8, shape))
    (own,) = measured(lambda _: 0.6, Operation("head", 8, shape))
    head = Operation("head", 8, shape)
    for path in ("fused", "prompts", "torch"):
        lookup = Lookup(replace(MACHINE, samples=(replace(product, op=f"{path}.linear"),)), "bfloat16")
        assert lookup.estimate(path, head).seconds == pytest.approx(2 * least(head))
    assert Lookup(replace(MACHINE, samples=(product, own)), "bfloat16").estimate(
        "fused", head
    ).seconds == pytest.approx(0.6 * least(head))


def test_far_ones_and_unknown_ones_say_so() -> None:
    near = Operation("linear", 16, (4096, 4096))
    lookup = Lookup(replace(MACHINE, samples=measured(lambda _: 1.5, near)), "bfloat16")
    far = lookup.estimate("fused", Operation("linear", 4096, (4096, 4096)))
    assert far.extrapolated
    assert far.seconds == pytest.approx(1.5 * least(Operation("linear", 4096, (4096, 4096))))
    assert lookup.estimate("torch", near).extrapolated
    assert lookup.estimate("fused", Operation("router", 8, (64, 2048, 8))).extrapolated


def test_ranks_of_a_cpu_share_it() -> None:
    cpu = Machine.load("cpu2")
    operation = Operation("linear", 16, (1024, 1024))
    alone = Lookup(cpu, "float32").estimate("torch", operation).seconds
    assert Lookup(cpu, "float32", ranks=4).estimate("torch", operation).seconds == pytest.approx(4 * alone)
    sample = Sample("torch.linear", "float32", 16, (1024, 1024), 1e-3, ranks=2)
    shared = replace(cpu, samples=(sample,))
    assert Lookup(shared, "float32", ranks=2).estimate("torch", operation).seconds == pytest.approx(1e-3, rel=1e-3)
    assert Lookup(shared, "float32", ranks=4).estimate("torch", operation).seconds == pytest.approx(2e-3, rel=1e-3)


def test_exchanges_by_latency_and_bandwidth() -> None:
    link = MACHINE.links[0]
    node = tuple(range(8))
    seconds = exchange_seconds(MACHINE, "all_reduce", node, 8e6)
    assert seconds == pytest.approx(2 * link.latency_s + 2 * 7 / 8 * 8e6 / link.bandwidth)
    assert exchange_seconds(MACHINE, "all_gather", node, 8e6) < seconds
    one_launch = exchange_seconds(MACHINE, "one_shot", node, 8e6)
    assert one_launch == pytest.approx(link.latency_s + 7 * 8e6 / link.bandwidth), "everybody reads all of the others"
    assert exchange_seconds(MACHINE, "all_reduce", (0,), 8e6) == 0
    assert exchange_seconds(MACHINE, "send", (0, 8), 1e6) == pytest.approx(
        MACHINE.links[1].latency_s + 1e6 / MACHINE.links[1].bandwidth
    )


def test_between_nodes_goes_a_node_s_share_only() -> None:
    two_nodes = exchange_seconds(MACHINE, "all_reduce", tuple(range(16)), 64e6)
    inner = exchange_seconds(MACHINE, "all_reduce", tuple(range(8)), 64e6)
    outer = MACHINE.links[1]
    assert two_nodes == pytest.approx(inner + outer.latency_s + 64e6 / 8 / outer.bandwidth)


def test_measured_exchanges_go_first() -> None:
    points = (Exchange("all_reduce", 2, 2**12, 1e-5), Exchange("all_reduce", 2, 2**20, 4e-5))
    captured = Exchange("all_reduce", 2, 2**12, 2e-6, captured=True)
    machine = replace(MACHINE, links=(Link("nvlink", 8, 4e-6, 3e11, (*points, captured)), MACHINE.links[1]))
    assert exchange_seconds(machine, "all_reduce", (0, 1), 2**12) == pytest.approx(1e-5)
    assert exchange_seconds(machine, "all_reduce", (0, 1), 2**16) == pytest.approx(2e-5)
    assert exchange_seconds(machine, "all_reduce", (0, 1), 100) == pytest.approx(1e-5)
    assert exchange_seconds(machine, "all_reduce", (0, 1), 2**22) == pytest.approx(16e-5)
    assert exchange_seconds(machine, "all_reduce", (0, 1), 2**12, captured=True) == pytest.approx(2e-6)
    assert exchange_seconds(machine, "all_reduce", tuple(range(8)), 2**20) > 4e-5
