"""Choosing tokens: those of the engine's sampler, row by row, whatever the tiles, the batch, and the filters."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.sampler import _draw, token_weights
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.kernels import sample as reference
from flexmoe.kernels.sample import SampleParams
from flexmoe.kernels.triton import argmax
from flexmoe.kernels.triton import sample as drawing
from flexmoe.kernels.triton.argmax import ArgmaxTile, greedy
from flexmoe.kernels.triton.sample import SampleTile, sample
from tests.kernels.support import DEVICE, ON_GPU

# The interpreter computes with numpy, which warns where a GPU says inf or NaN, and of loop bounds in small arrays.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

SMALL = SampleTile(chunk=128, slice=128, lanes=8, enough=4, block=64, room=64)
V = 300


def scratch(words: int) -> Tensor:
    """Full of what is neither zero nor a number."""
    return torch.full((words,), -1, dtype=torch.int64, device=DEVICE)


class Tokens:
    """Where tokens go, and rows behind that nobody may write."""

    def __init__(self, rows: int) -> None:
        self._whole = torch.full((rows + 4,), -7, dtype=torch.int64, device=DEVICE)
        self.tensor = self._whole[:rows]

    def check(self) -> list[int]:
        tokens: list[int] = self._whole.tolist()
        assert tokens[-4:] == [-7] * 4, "written past the end"
        return tokens[:-4]


def draw(logits: Tensor, params: SampleParams, tile: SampleTile = SMALL, filtered: bool = True) -> list[int]:
    out = Tokens(len(logits))
    words = drawing.scratch_words(*logits.shape, tile)
    sample(logits, params, out.tensor, scratch(words), tile=tile, filtered=filtered)
    return out.check()


def pick(logits: Tensor, tile: ArgmaxTile) -> list[int]:
    out = Tokens(len(logits))
    greedy(logits, out.tensor, scratch(argmax.scratch_words(*logits.shape, tile)), tile=tile)
    return out.check()


def states_of(options: list[dict[str, Any]], seed: int = 0) -> list[SamplingState]:
    return [SamplingState(SamplingParams.from_options(o), seed=seed + row) for row, o in enumerate(options)]


def params_of(states: list[SamplingState]) -> SampleParams:
    """What a caller makes of the states."""
    rows = [s.params for s in states]
    cold = [0.0 if p.greedy else max(p.temperature, reference.COLDEST) for p in rows]
    return SampleParams(
        torch.tensor(cold, dtype=torch.float32, device=DEVICE),
        torch.tensor([p.top_k for p in rows], dtype=torch.int32, device=DEVICE),
        torch.tensor([p.top_p for p in rows], dtype=torch.float64, device=DEVICE),
        torch.tensor([p.min_p for p in rows], dtype=torch.float32, device=DEVICE),
        torch.tensor([s.uniform() for s in states], dtype=torch.float64, device=DEVICE),
    )


def logits_of(kind: str, rows: int, columns: int = V) -> Tensor:
    noise = torch.randn(rows, columns)
    peaks = torch.zeros(rows, columns).scatter_(1, torch.randint(columns, (rows, 1)), 20.0)
    logits = {
        "normal": noise * 3,
        "flat": noise * 0.01,
        "peaked": noise + peaks,
        "tied": (noise * 2).round(),
        "equal": torch.ones(rows, columns) * 4,
        "banned": torch.where(noise > 0, noise * 3, -math.inf),
        "biased": torch.where(noise > 1, -1e9, noise),
    }[kind]
    return logits.to(DEVICE)


KINDS = ("normal", "flat", "peaked", "tied", "equal", "banned", "biased")
OPTIONS: list[dict[str, Any]] = [
    {"temperature": t} | filters
    for t, filters in itertools.product(
        (1.0, 0.7, 1e-30, 100.0, 1e-300),
        (
            {},
            {"top_k": 1},
            {"top_k": 40},
            {"top_k": V - 1},
            {"top_k": 10**9},
            {"top_p": 0.9},
            {"top_p": 1e-9},
            {"top_p": 0.9999},
            {"min_p": 0.05},
            {"min_p": 1.0},
            {"top_k": 50, "top_p": 0.95},
            {"top_k": 3, "top_p": 0.5},
            {"top_k": 200, "top_p": 0.999, "min_p": 0.01},
        ),
    )
] + [{"temperature": 0.0}, {"temperature": 0.0, "top_k": 5, "top_p": 0.5}]


def assert_drawn(found: list[int], logits: Tensor, states: list[SamplingState]) -> None:
    """Tokens of the engine's sampler; another one only where rounding decides, next to a step of the running sum."""
    work = logits.cpu()
    expected = _draw(work, states).tolist()
    assert min(found) >= 0
    assert max(found) < logits.shape[1]
    for row, state in enumerate(states):
        if found[row] != expected[row]:
            running = token_weights(work[row : row + 1], [state])[0].double().cumsum(0)
            before = running[found[row] - 1] if found[row] else torch.zeros(())
            low, high = float(before / running[-1]), float(running[found[row]] / running[-1])
            point = state.uniform()
            assert low - 1e-6 <= point <= high + 1e-6, f"row {row}: {found[row]}, not {expected[row]}, {state.params}"


# ------------------------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize(("rows", "columns", "chunk"), [(1, 1, 64), (3, 257, 64), (5, 1000, 256), (2, 4096, 4096)])
def test_greedy(rows: int, columns: int, chunk: int) -> None:
    logits = torch.randn(rows, columns, device=DEVICE)
    assert pick(logits, ArgmaxTile(chunk)) == logits.argmax(-1).tolist()


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.full((6, V), -2.0, device=DEVICE)
    logits[0, [17, 40, 200, 299]] = 1.0
    logits[1, 299] = 1.0
    logits[2] = -math.inf
    logits[3, [70, 250]] = math.inf
    logits[4, 90], logits[4, 200] = -0.0, 0.0
    assert pick(logits, ArgmaxTile(64)) == [17, 299, 0, 70, 90, 0]


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_greedy_refuses_what_is_no_number(nan: float) -> None:
    logits = torch.randn(4, V, device=DEVICE)
    expected = logits.argmax(-1).tolist()
    logits[1, 7], logits[1, 8], logits[3, 299] = math.inf, nan, nan
    found = pick(logits, ArgmaxTile(64))
    assert found == [expected[0], -1, expected[2], -1] == reference.greedy(logits).tolist()


def test_rows_may_be_apart() -> None:
    wide = torch.randn(3, 400, device=DEVICE)
    wide[:, V:] = 99.0
    logits = wide[:, :V]
    params = params_of(states_of([{}, {"top_k": 20}, {"top_p": 0.7}]))
    assert pick(logits, ArgmaxTile(128)) == logits.argmax(-1).tolist()
    assert draw(logits, params) == draw(logits.contiguous(), params)


# ------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("columns", [257, V] if ON_GPU else [257])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_draws_the_same(kind: str, columns: int) -> None:
    options = [o for o in OPTIONS if o["temperature"] > 0]
    options = options * 16 if ON_GPU else random.sample(options, 5)
    states = states_of(options, seed=random.randrange(10**6))
    logits = logits_of(kind, len(states), columns)
    assert_drawn(draw(logits, params_of(states)), logits, states)


@pytest.mark.parametrize("tile", [SMALL, replace(SMALL, rounds=1), replace(SMALL, rounds=2, lanes=2, room=2)])
@pytest.mark.parametrize("kind", ["normal", "flat", "tied", "banned"])
def test_which_tokens_stay(kind: str, tile: SampleTile) -> None:
    """With falling logits and a point next to 1, the token drawn is the last that the filters keep."""
    options = [o for o in OPTIONS if len(o) > 1 and o["temperature"] > 1e-3]
    options = options * 16 if ON_GPU else random.sample(options, 3)
    states = states_of(options)
    logits = logits_of(kind, len(states)).sort(-1, descending=True).values
    params = replace(params_of(states), uniform=torch.full((len(states),), 1 - 1e-10, dtype=torch.float64).to(DEVICE))
    weights = token_weights(logits.cpu(), states).double()
    running = weights.cumsum(-1)
    last = torch.searchsorted(running, running[:, -1:] * (1 - 1e-10), right=True)[:, 0]
    found = draw(logits, params, tile)
    # Where a share of the weight is within rounding of top_p, either side is right; that is rare.
    assert sum(token != expected for token, expected in zip(found, last.tolist(), strict=True)) <= len(found) // 500


def test_equally_likely_tokens_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], device=DEVICE)
    options: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.36}, {"top_p": 0.4}, {"top_k": 4}]
    states = states_of(options)
    params = replace(params_of(states), uniform=torch.full((5,), 1 - 2.0**-53, dtype=torch.float64, device=DEVICE))
    assert draw(logits.repeat(5, 1), params) == [3, 3, 3, 0, 3]


def test_tiles_change_nothing() -> None:
    states = states_of([{"top_k": 40, "top_p": 0.9}, {"top_p": 0.99}, {"temperature": 0.0}, {"temperature": 3.0}])
    logits, params = logits_of("normal", len(states), 600), params_of(states)
    expected = reference.sample(logits, params).tolist()
    tiles = [
        SMALL,
        SampleTile(chunk=512, slice=1024, rounds=2, lanes=32, block=256),
        SampleTile(chunk=1024, slice=512, rounds=1, room=4),
        drawing.default_tile(*logits.shape),
    ]
    assert [draw(logits, params, tile) for tile in tiles] == [expected] * len(tiles)


def test_alone_and_in_a_batch() -> None:
    options = [{}, {"top_k": 9}, {"temperature": 0.0}, {"top_p": 0.8, "min_p": 0.01}, {"temperature": 9.0, "top_k": 99}]
    logits, params = logits_of("normal", len(options)), params_of(states_of(options))
    together = draw(logits, params)
    assert together == draw(logits, params)
    for row in range(len(options)):
        one = SampleParams(*(getattr(params, f.name)[row : row + 1].clone() for f in fields(params)))
        assert draw(logits[row : row + 1], one) == together[row : row + 1]


def test_greedy_rows_in_a_batch() -> None:
    options = [{"temperature": 0.0}, {"top_k": 3}, {"temperature": 0.0, "top_p": 0.1}, {}]
    logits = logits_of("tied", len(options))
    found = draw(logits, params_of(states_of(options)))
    assert found[::2] == [logits[row].tolist().index(float(logits[row].max())) for row in (0, 2)]


def test_without_filters() -> None:
    states = states_of([{}, {"temperature": 0.3, "min_p": 0.1}, {"temperature": 0.0}, {"temperature": 50.0}])
    logits, params = logits_of("normal", len(states)), params_of(states)
    assert draw(logits, params, filtered=False) == draw(logits, params)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}])
def test_logits_that_are_no_numbers(options: dict[str, Any]) -> None:
    logits = logits_of("normal", 6)
    logits[0, 5], logits[1, 299], logits[3], logits[4, 3] = math.nan, math.inf, -math.inf, -math.inf
    states = states_of([options] * 6)
    found = draw(logits, params_of(states))
    assert [found[row] for row in (0, 1, 3)] == [-1, -1, -1]
    rest = [2, 4, 5]
    assert_drawn([found[row] for row in rest], logits[rest], [states[row] for row in rest])
    assert reference.sample(logits, params_of(states)).tolist() == found


def test_the_reference() -> None:
    states = states_of(OPTIONS, seed=5)
    for kind in KINDS:
        logits = logits_of(kind, len(states))
        drawn = [row for row, state in enumerate(states) if not state.params.greedy]
        found = reference.sample(logits, params_of(states)).tolist()
        assert_drawn([found[row] for row in drawn], logits[drawn], [states[row] for row in drawn])


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA; the interpreter would take minutes")
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("kind", ["normal", "flat", "tied"])
def test_a_large_vocabulary_in_a_cuda_graph(kind: str, rows: int) -> None:
    states = states_of([random.choice(OPTIONS[:-2]) for _ in range(rows)])
    logits, params = logits_of(kind, rows, 151_936), params_of(states)
    out = torch.full((2, rows), -7, dtype=torch.int64, device=DEVICE)
    words = scratch(drawing.scratch_words(*logits.shape)), scratch(argmax.scratch_words(*logits.shape))

    def launch() -> None:
        sample(logits, params, out[0], words[0], pdl=True)
        greedy(logits, out[1], words[1], pdl=True)

    launch()  # compiles, which may not happen while capturing
    torch.cuda.synchronize()
    expected = draw(logits, params, drawing.default_tile(*logits.shape))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for _ in range(3):
        out.fill_(-7)
        graph.replay()
        assert out.tolist() == [expected, reference.greedy(logits).tolist()]
    assert_drawn(expected, logits, states)


def test_an_empty_batch_and_wrong_sizes() -> None:
    assert draw(torch.zeros(0, V, device=DEVICE), params_of([])) == []
    params = params_of(states_of([{}]))
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="holds 9 of"):
        sample(torch.zeros(1, V, device=DEVICE), params, out, scratch(9), tile=SMALL)
    with pytest.raises(ValueError, match="at most 500000"):
        sample(torch.zeros(1, 500_001, device=DEVICE), params, out, scratch(9))
