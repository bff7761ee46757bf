"""Arrivals, traces and prompts: what is asked of a server, and when."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.bench.load import LoadOptions, lengths, plan, read_prompts, warm_up
from flexmoe.errors import ConfigError
from flexmoe.planner.arrivals import poisson
from flexmoe.planner.trace import TraceRequest, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
2023-11-16 18:16:00.6805900,879,0
"""
MOONCAKE = (
    {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]},
    {"timestamp": 30535, "input_length": 600, "output_length": 26, "hash_ids": [46, 99]},
)


def trace_file(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# ------------------------------------------------------------------ arrivals


def test_poisson_has_the_rate_and_exponential_gaps() -> None:
    due = poisson(50.0, 20_000, seed=1)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *due])]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution 1 - 1/e lies below the mean.
    assert sum(gap < 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.015)


@given(st.floats(0.01, 1e4), st.integers(0, 50), st.integers(0, 50), st.integers())
def test_poisson_arrivals_are_in_order_and_do_not_depend_on_the_count(
    rate: float, n: int, more: int, seed: int
) -> None:
    due = poisson(rate, n + more, seed)
    assert due[:n] == poisson(rate, n, seed)
    assert len(due) == n + more
    assert all(before <= after for before, after in itertools.pairwise([0.0, *due]))


# ------------------------------------------------------------------ traces


def test_azures_format(tmp_path: Path) -> None:
    assert read_trace(trace_file(tmp_path, AZURE)) == [
        TraceRequest(0.0, 374, 44),
        TraceRequest(pytest.approx(4.25), 396, 109),
        TraceRequest(pytest.approx(14.0), 879, 0),
    ]


def test_azures_format_with_other_columns_a_zone_and_out_of_order(tmp_path: Path) -> None:
    lines = ("Id,GeneratedTokens,TIMESTAMP,ContextTokens", "a,3,2024-05-12 00:00:01.5+00:00,2", "b,5,2024-05-12,4")
    text = "\n".join(lines)
    assert read_trace(trace_file(tmp_path, text)) == [TraceRequest(0.0, 4, 5), TraceRequest(1.5, 2, 3)]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_mooncakes_format(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = tmp_path / f"trace.jsonl{suffix}"
    path.write_bytes(pack("\n\n".join(map(json.dumps, MOONCAKE)).encode()))
    assert read_trace(path) == [
        TraceRequest(0.0, 1100, 52, (46, 47, 48)),
        TraceRequest(pytest.approx(3.053), 600, 26, (46, 99)),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: neither a JSON object"),
        ("TIMESTAMP,ContextTokens\n", "line 1: neither a JSON object with timestamp, "),
        ("[1]\n", "line 1: neither a JSON object"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        (AZURE + "\n2023-11-16 18:16:01,many,3\n", "line 6: invalid literal for int"),
        (AZURE + "yesterday,1,3\n", "line 5: Invalid isoformat string: 'yesterday'"),
        (AZURE + "2023-11-16 18:16:01,1\n", "line 5: 2 values, but 3 columns"),
        (AZURE + "2023-11-16 18:16:01,1,-3\n", "line 5: -3 is not a number of tokens"),
        ('{"timestamp": 1, "input_length": 5}\n', "line 1: output_length is missing"),
        (json.dumps(MOONCAKE[0]) + "\n{oops\n", "line 2: Expecting property name"),
        (json.dumps(MOONCAKE[0]) + "\n[1]\n", "line 2: not a JSON object"),
        (json.dumps(MOONCAKE[0] | {"input_length": 1.5}), "line 1: 1.5 is not a number of tokens"),
        (json.dumps(MOONCAKE[0] | {"hash_ids": None}), "line 1: 'NoneType' object is not iterable"),
        (json.dumps(MOONCAKE[0] | {"timestamp": "soon"}), "line 1: could not convert string to float: 'soon'"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1}', "line 1: timestamp=nan is not a number"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = trace_file(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "data"), [("trace.xz", b"no xz"), ("trace.gz", b"no gz"), ("trace", b"\xff\xfe")])
def test_what_cannot_be_read(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=f"the trace .*{name} cannot be read: "):
        read_trace(tmp_path / name)


# ------------------------------------------------------------------ plans


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    return trace_file(tmp_path, "\n".join(map(json.dumps, MOONCAKE)))


def test_prompts_of_a_trace_share_the_blocks_that_they_shared(mooncake: Path) -> None:
    first, second = plan(LoadOptions(trace=mooncake), vocab_size=10**6)
    assert isinstance(first.prompt, list)
    assert isinstance(second.prompt, list)
    assert (len(first.prompt), len(second.prompt)) == (1100, 600)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:]
    assert (first.due, second.due) == (0, pytest.approx(3.053))
    assert (first.output_len, second.output_len) == (52, 26)


def test_scales_and_limits_of_a_trace(mooncake: Path) -> None:
    first, second = plan(LoadOptions(trace=mooncake, time_scale=2, length_scale=0.01, text=True), vocab_size=9)
    assert isinstance(second.prompt, str)
    assert (len(str(first.prompt).split()), len(second.prompt.split())) == (11, 6)
    assert (second.due, second.output_len) == (pytest.approx(6.106), 1)
    assert str(first.prompt).split()[:5] == second.prompt.split()[:5]
    assert [request.number for request in plan(LoadOptions(trace=mooncake, duration=3.0), 9)] == [0]
    assert [request.number for request in plan(LoadOptions(trace=mooncake, num_requests=1), 9)] == [0]


@given(
    st.integers(1, 40),
    st.tuples(st.integers(1, 9), st.integers(0, 9)),
    st.integers(1, 300),
    st.booleans(),
    st.integers(),
)
def test_random_prompts_have_their_lengths(
    count: int, bounds: tuple[int, int], vocab_size: int, text: bool, seed: int
) -> None:
    low, high = bounds[0], sum(bounds)
    options = LoadOptions(num_requests=count, input_len=(low, high), output_len=(low, high), text=text, seed=seed)
    requests = list(plan(options, vocab_size))
    assert requests == list(plan(options, vocab_size))
    assert [request.number for request in requests] == list(range(count))
    for request in requests:
        units = request.prompt.split() if isinstance(request.prompt, str) else request.prompt
        assert low <= len(units) <= high
        assert low <= request.output_len <= high
        assert text or all(isinstance(unit, int) and 0 <= unit < vocab_size for unit in units)


def test_what_warms_up_is_not_asked_again() -> None:
    options = LoadOptions(num_requests=5, warm_up=3)
    before = [request.prompt for request in warm_up(options, 1000)]
    assert len(before) == 3
    assert not any(request.prompt in before for request in plan(options, 1000))


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 100), ({"rate": 5.0}, 100), ({"rate": 5.0, "num_requests": 7}, 7), ({"rate": 5.0, "duration": 1e-9}, 0)],
)
def test_how_many(options: dict[str, Any], count: int) -> None:
    assert len(list(plan(LoadOptions(**options), 10))) == count


def test_a_rate_fills_the_duration() -> None:
    due = [request.due for request in plan(LoadOptions(rate=50, duration=20, input_len=(1, 1)), 10)]
    assert len(due) == pytest.approx(1000, rel=0.15)
    assert 19.5 < (due[-1] or 0) <= 20


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = trace_file(tmp_path, '"a"\n\n[1, 2]\n{"prompt": [3], "max_tokens": 4}\n{"messages": [{"role": "user"}]}\n')
    assert read_prompts(path) == [("a", None), ([1, 2], None), ([3], 4), ([{"role": "user"}], None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "are empty"),
        ('"a"\nb', "line 2: Expecting value"),
        ("[]", "line 1: no text, list of token ids"),
        ('["a"]', "line 1: no text, list of token ids"),
        ("{}", "line 1: no text, list of token ids"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens=0 is not a positive integer"),
    ],
)
def test_wrong_prompts_are_refused_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    path = trace_file(tmp_path, text)
    with pytest.raises(ConfigError, match=said):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere")


# ------------------------------------------------------------------ without prompts


def test_a_simulation_is_asked_the_same(tmp_path: Path) -> None:
    azure = trace_file(tmp_path, AZURE)
    for options in (
        LoadOptions(rate=5, num_requests=20, input_len=(1, 90), output_len=(1, 9)),
        LoadOptions(trace=azure, time_scale=2, length_scale=0.1, duration=10),
    ):
        asked = [(one.due, len(one.prompt), one.output_len) for one in plan(options, 50)]
        assert [(one.arrival, one.input_len, one.output_len) for one in lengths(options)] == asked
        assert len(asked) >= 2
    mooncake = trace_file(tmp_path, "\n".join(map(json.dumps, MOONCAKE)), "blocks")
    assert [one.blocks for one in lengths(LoadOptions(trace=mooncake))] == [(46, 47, 48), (46, 99)]
    assert lengths(LoadOptions(trace=mooncake, length_scale=0.5))[0].blocks == ()
    for unknown in (LoadOptions(), LoadOptions(rate=1, text=True)):
        with pytest.raises(ConfigError, match="can be simulated"):
            lengths(unknown)
    closed = LoadOptions(num_requests=3, input_len=(5, 5), output_len=(7, 7))
    assert [(one.arrival, one.input_len, one.output_len) for one in lengths(closed, 3)] == [(0.0, 5, 7)] * 3
    with pytest.raises(ConfigError, match="can be simulated"):
        lengths(closed, 2)  # the third is due when another has ended
