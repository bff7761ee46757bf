"""`flexmoe bench serve` against a small server: times, limits, prompts, errors; no request is ever lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flexmoe.bench.endpoint import EndpointOptions
from flexmoe.bench.load import LoadOptions
from flexmoe.bench.outcomes import Slo
from flexmoe.bench.serving import Report, ServeOptions, measure
from flexmoe.cli.main import main
from flexmoe.errors import ConfigError
from tests.openai_server import MODELS, FakeServer

BEHAVIOURS = {
    1: "429",
    2: "500",
    3: "html",
    4: "no http",
    5: "close",
    6: "drop",
    7: "truncate",
    8: "garbage",
    9: "error",
    10: "hang",
}
ERRORS = {"HTTP 429": 1, "HTTP 500": 1, "bad answer": 3, "cut off": 3, "server error": 1, "timeout": 1}


def ask(server: FakeServer, *, concurrency: int | None = None, slo: Slo | None = None, **options: Any) -> Report:
    """Without warm-up, unless asked for."""
    endpoint = {name: options.pop(name) for name in ("endpoint", "timeout", "api_key", "model") if name in options}
    load = LoadOptions(**{"warm_up": 0, "input_len": (5, 5), "output_len": (4, 4), **options})
    return measure(
        ServeOptions(
            endpoint=EndpointOptions(url=server.url, **endpoint), load=load, slo=slo or Slo(), concurrency=concurrency
        )
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "serve", *arguments])


# ------------------------------------------------------------------ times


def test_the_times_are_those_of_the_server() -> None:
    with FakeServer(gap=0.03) as server:
        start = time.perf_counter()
        report = ask(server, num_requests=6, concurrency=3)
        took = time.perf_counter() - start
    found = report.row["result"]
    assert (found["requests"], found["succeeded"], found["errors"]) == (6, 6, {})
    # Each text comes 30 ms after the last, the first after 30 ms: two rounds of three requests of four texts. A busy
    # machine is late and never early; only two texts may come closer to each other, if the first of them was late.
    assert 30 <= found["ttft_ms"]["p50"] <= found["e2e_ms"]["p50"] <= 1e3 * took
    assert found["e2e_ms"]["p50"] >= 120
    assert 0.24 <= found["seconds"] <= took
    assert 0 < found["tpot_ms"]["mean"] == pytest.approx(found["itl_ms"]["mean"], abs=0.01)
    assert found["ttft_ms"]["mean"] + 3 * found["tpot_ms"]["mean"] <= found["e2e_ms"]["mean"] + 0.01
    assert found["output_tokens_per_s"] == pytest.approx(6 * 4 / found["seconds"], rel=0.01)
    assert found["total_tokens_per_s"] == pytest.approx(6 * 11 / found["seconds"], rel=0.01)
    assert (found["prompt_tokens"], found["output_tokens"], found["cached_tokens"]) == (42, 24, 18)
    assert (found["tokens_counted_by"], found["finish_reasons"]) == ("usage", {"length": 6})
    assert found["queued_ms"] is None
    assert found["client"]["late_ms"] is None


def test_what_is_good_enough_is_counted() -> None:
    with FakeServer({1: "500"}, gap=0.02) as server:
        found = ask(server, num_requests=4, slo=Slo(ttft_ms=60_000, tpot_ms=60_000)).row["result"]
        assert found["within_slo"] == 3
        assert found["goodput_requests_per_s"] == pytest.approx(3 / found["seconds"], rel=0.01)
        assert ask(server, num_requests=4, slo=Slo(ttft_ms=20)).row["result"]["within_slo"] == 0


def test_pieces_are_counted_where_the_server_does_not_count_tokens() -> None:
    with FakeServer(usage=False) as server:
        found = ask(server, num_requests=3).row["result"]
        said = run("--url", server.url, "--num-requests", "2").stdout
    assert (found["tokens_counted_by"], found["output_tokens"], found["total_tokens_per_s"]) == ("chunks", 12, None)
    assert "pieces of text were counted" in said


# ------------------------------------------------------------------ arrivals


def test_a_closed_loop_keeps_as_many_under_way_as_asked_for() -> None:
    with FakeServer(gap=0.01, together=3) as server:
        report = ask(server, num_requests=12, concurrency=3)
        assert server.most_running == 3
    assert report.row["result"]["most_running"] == 3
    assert report.row["params"]["concurrency"] == 3


def test_an_open_loop_sends_when_due_and_a_limit_makes_requests_wait() -> None:
    with FakeServer(gap=0.02, together=5) as server:
        free = ask(server, num_requests=20, rate=200.0).row["result"]
    with FakeServer(gap=0.02) as server:
        limited = ask(server, num_requests=20, rate=200.0, concurrency=2).row["result"]
    assert free["most_running"] > 4
    assert free["queued_ms"]["p50"] < limited["queued_ms"]["p50"] / 4
    assert 0 <= free["client"]["late_ms"]["p50"] <= 1e3 * free["seconds"]
    assert limited["most_running"] == 2
    assert limited["queued_ms"]["max"] > 200  # the last of 20 waits for nine pairs of 80 ms, less its arrival
    assert limited["ttft_ms"]["p50"] < limited["queued_ms"]["p50"]  # waiting is not the server's time


def test_a_trace_says_when_how_long_and_what_is_shared(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000, "input_length": 1024, "output_length": 20, "hash_ids": [1, 2]},
        {"timestamp": 1400, "input_length": 1000, "output_length": 40, "hash_ids": [1, 3]},
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    with FakeServer() as server:
        report = ask(server, trace=trace, length_scale=0.1, time_scale=0.5)
    first, second = server.requests
    assert [outcome.due for outcome in report.outcomes] == [0, pytest.approx(0.2)]
    assert report.outcomes[1].sent >= 0.2
    assert (len(first["prompt"]), len(second["prompt"])) == (102, 100)
    assert (first["max_tokens"], second["max_tokens"]) == (2, 4)
    assert first["prompt"][:51] == second["prompt"][:51]
    assert first["prompt"][51:100] != second["prompt"][51:]


# ------------------------------------------------------------------ what is sent


def test_completions_get_token_ids_below_the_servers_vocabulary() -> None:
    with FakeServer() as server:
        row = ask(server, num_requests=5, input_len=(3, 9)).row
    assert row["params"]["vocab_size"] == 50
    for asked in server.requests:
        assert 3 <= len(asked["prompt"]) <= 9
        assert max(asked["prompt"]) < 50
        assert (asked["model"], asked["ignore_eos"], asked["stream"]) == ("tiny", True, True)
        assert asked["path"] == "/v1/completions"
    assert len({tuple(asked["prompt"]) for asked in server.requests}) == 5


def test_chats_get_words_and_servers_without_ignore_eos_are_not_asked_for_it(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    with FakeServer() as server:
        result = run("--url", server.url + "/v1/", "--endpoint", "chat", "--no-ignore-eos", "--input-len", "6",
                     "--num-requests", "2", "--warm-up", "1", "--out", str(out))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(server.requests) == 3
    for asked in server.requests:
        assert (asked["path"], "ignore_eos" in asked) == ("/v1/chat/completions", False)
        assert [message["role"] for message in asked["messages"]] == ["user"]
        assert len(asked["messages"][0]["content"].split()) == 6
    assert json.loads(out.read_text())["result"]["requests"] == 2


def test_prompts_of_a_file_are_asked_in_turn(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"hello"\n[1, 2]\n{"prompt": "you", "max_tokens": 2}\n')
    with FakeServer() as server:
        ask(server, prompts=prompts, num_requests=4, concurrency=1)
    assert [(asked["prompt"], asked["max_tokens"]) for asked in server.requests] == [
        ("hello", 4),
        ([1, 2], 4),
        ("you", 2),
        ("hello", 4),
    ]


def test_a_prompt_that_the_endpoint_does_not_take_is_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    with FakeServer() as server:
        prompts.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
        ask(server, prompts=prompts, num_requests=1, endpoint="chat")
        assert server.requests[0]["messages"] == [{"role": "user", "content": "hi"}]
        with pytest.raises(ConfigError, match="a prompt of messages is for a chat"):
            ask(server, prompts=prompts)
        prompts.write_text("[1, 2]")
        with pytest.raises(ConfigError, match="a chat takes no token ids"):
            ask(server, prompts=prompts, endpoint="chat")


# ------------------------------------------------------------------ failures


ARRIVALS: dict[str, dict[str, Any]] = {
    "closed": {"concurrency": 4},
    "open": {"rate": 500.0},
    "open, limited": {"rate": 500.0, "concurrency": 2},
}


def ask_badly(arrivals: dict[str, Any]) -> tuple[Report, int]:
    """Of a server that misbehaves in all ways; and how many requests reached it."""
    with FakeServer(BEHAVIOURS, gap=0.002) as server:
        report = ask(server, num_requests=30, timeout=4.0, **arrivals)
    return report, len(server.requests)


@pytest.fixture(scope="module")
def reports() -> Iterator[dict[str, Future[tuple[Report, int]]]]:
    """By arrivals: all at once, for what takes its time is waiting for the answer that never comes."""
    with ThreadPoolExecutor(len(ARRIVALS)) as clients:
        yield {name: clients.submit(ask_badly, arrivals) for name, arrivals in ARRIVALS.items()}


@pytest.mark.parametrize("name", ARRIVALS)
def test_every_request_is_accounted_for(reports: dict[str, Future[tuple[Report, int]]], name: str) -> None:
    report, asked = reports[name].result()
    found = report.row["result"]
    assert [outcome.number for outcome in report.outcomes] == list(range(30))
    assert found["errors"] == ERRORS
    assert found["succeeded"] + sum(found["errors"].values()) == found["requests"] == 30
    assert {outcome.number for outcome in report.outcomes if outcome.error} == set(BEHAVIOURS)
    assert found["error_messages"]["HTTP 429"] == "too many requests"
    assert found["error_messages"]["server error"] == "the engine died"
    assert found["error_messages"]["timeout"] == "no answer within 4 s"
    assert asked == 30  # each was sent, and sent once
    partial = report.outcomes[6]
    assert (partial.error, len(partial.texts)) == ("cut off", 2)


def test_a_server_that_goes_away_is_an_error_for_each_request() -> None:
    with FakeServer({8: "leave"}, gap=0.01) as server:
        found = ask(server, num_requests=40, concurrency=2).row["result"]
    assert 7 <= found["succeeded"] <= 8
    assert found["errors"]["no connection"] >= 30
    assert found["succeeded"] + sum(found["errors"].values()) == 40


def test_failures_are_told_and_written(tmp_path: Path) -> None:
    out, lines = tmp_path / "rows.jsonl", tmp_path / "requests.jsonl"
    with FakeServer({1: "429", 2: "429"}) as server:
        result = run("--url", server.url, "--num-requests", "5", "--warm-up", "0", "--out", str(out),
                     "--requests", str(lines), "--slo-ttft-ms", "5000")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3 of 5 requests answered" in result.stdout
    assert "2 failed, HTTP 429: too many requests" in result.stdout
    assert "within TTFT 5000 ms: 3 of 5 requests" in result.stdout
    assert "knew 43% of the prompts' tokens from before" in result.stdout  # 3 of 7, as this server always says
    requests = [json.loads(line) for line in lines.read_text().splitlines()]
    assert Counter(request["error"] for request in requests) == {None: 3, "HTTP 429": 2}
    row = json.loads(out.read_text())
    assert (row["benchmark"], row["engine"], row["model"]) == ("serve", "fake", {"name": "tiny"})
    assert row["config"]["version"] == {"version": "1.2.3"}
    assert row["device"]["kind"] == "cpu"
    assert row["result"]["errors"] == {"HTTP 429": 2}


def test_a_row_says_how_near_to_its_floor_a_server_is_or_why_not(tmp_path: Path) -> None:
    ours = {"data": [MODELS["data"][0] | {"owned_by": "flexmoe"}]}  # type: ignore[index]
    engine = {"model": "olmoe-1b-7b", "parameters": 6_919_161_856, "device": "cuda:0", "dtype": "bfloat16"}
    out, words = (
        tmp_path / "rows.jsonl",
        ("--num-requests", "3", "--warm-up", "0", "--out", str(tmp_path / "rows.jsonl")),
    )
    with FakeServer(models=ours, engine=engine | {"quantization": None}, gap=0.01) as server:
        known = run("--url", server.url, "--machine", "h200x1", *words)
        run("--url", server.url, *words)
    with FakeServer() as server:
        run("--url", server.url, "--machine", "h200x1", *words)
    with_floor, no_machine, foreign = map(json.loads, out.read_text().splitlines())
    assert (with_floor["config"]["machine"], with_floor["result"]["read_gb_s"]) == ("h200x1", 4529.9)
    found = with_floor["result"]
    # Three sequences read more than the 0.52 ms of one, less than three times that.
    assert 0.52 < found["floor_ms"] < 3 * 0.53
    assert found["percent_of_floor"] == pytest.approx(100 * found["floor_ms"] / found["tpot_ms"]["mean"], rel=0.01)
    assert found["percent_of_first_token_floor"] < 100
    assert (
        f"floor of TPOT with {found['floor_sequences']} sequences at once: {found['floor_ms']:.2f} ms" in known.stdout
    )
    assert (no_machine["config"]["machine"], no_machine["result"]["floor_unknown"]) == (None, "unknown machine")
    assert foreign["result"]["floor_unknown"] == "unknown model"
    wrong = run("--url", server.url, "--machine", "nowhere")
    assert wrong.exit_code != 0
    assert "nowhere" in wrong.output


def test_a_row_of_our_own_server_says_what_it_runs_with() -> None:
    ours = {"data": [MODELS["data"][0] | {"owned_by": "flexmoe"}]}  # type: ignore[index]
    with FakeServer(models=ours, engine={"max_num_seqs": 64}) as server:
        assert ask(server, num_requests=1).row["config"]["engine"] == {"max_num_seqs": 64}
    with FakeServer(models=ours) as server:
        assert ask(server, num_requests=1).row["config"]["engine"] is None, "an older one"
    with FakeServer(engine={"max_num_seqs": 64}) as server:
        assert ask(server, num_requests=1).row["config"]["engine"] is None, "another one is not asked"


def interrupted(server: FakeServer, after: int, *arguments: str) -> str:
    """What the command prints when Ctrl-C comes after so many requests."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flexmoe", "bench", "serve", "--url", server.url, "--num-requests", "1000", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(server.requests) < after and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    return said


@pytest.mark.parametrize("arrivals", [("--concurrency", "2"), ("--rate", "100", "--concurrency", "2")])
def test_ctrl_c_prints_what_there_is(tmp_path: Path, arrivals: tuple[str, ...]) -> None:
    out = tmp_path / "rows.jsonl"
    with FakeServer(gap=0.02) as server:
        said = interrupted(server, 9, "--output-len", "4", "--out", str(out), *arrivals)
    found = json.loads(out.read_text())["result"]
    assert found["succeeded"] >= 4
    assert found["errors"]["interrupted"] <= 2
    assert found["succeeded"] + sum(found["errors"].values()) == 1000
    assert f"{found['succeeded']} of 1000 requests answered" in said
    assert "TTFT" in said


def test_ctrl_c_while_it_warms_up() -> None:
    with FakeServer(gap=0.5) as server:
        said = interrupted(server, 1)
    assert "0 of 1000 requests answered" in said
    assert "1000 failed, not sent" in said
    assert len(server.requests) <= 2


def test_a_server_that_refuses_all(tmp_path: Path) -> None:
    with FakeServer(dict.fromkeys(range(9), "strict")) as server:
        result = run("--url", server.url, "--num-requests", "3", "--warm-up", "1")
    assert result.exit_code == 1
    assert "warm-up: 1 of 1 requests failed: HTTP 422: unknown field ignore_eos" in result.stderr
    assert "0 of 3 requests answered" in result.stdout
    assert "leave it out with --no-ignore-eos" in result.stdout


# ------------------------------------------------------------------ errors in one line


def refusal(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def test_no_server() -> None:
    with FakeServer() as server:
        url = server.url
    assert f"no server answers at {url} (" in refusal("--url", url)
    assert "is no address of a server" in refusal("--url", "localhost:8000")


def test_a_model_that_is_not_served() -> None:
    with FakeServer() as server:
        said = refusal("--url", server.url, "--model", "huge")
    assert f"model='huge' is not served at {server.url}; it serves tiny." in said


def test_keys() -> None:
    with FakeServer(key="secret") as server:
        assert "refuses the key (HTTP 401); give the right one as --api-key." in refusal("--url", server.url)
        report = ask(server, api_key="secret", num_requests=2)
    assert report.row["result"]["succeeded"] == 2
    assert "secret" not in json.dumps(report.row)


@pytest.mark.parametrize("models", ["what?", {"data": []}, {"data": ["tiny"]}, [1]])
def test_a_server_that_lists_no_models(models: Any) -> None:
    with FakeServer(models=models) as server:
        assert "gives no list of models (HTTP 200); name one as --model." in refusal("--url", server.url)
        result = run("--url", server.url, "--model", "mine", "--num-requests", "2", "--warm-up", "0", "--text")
    assert "The server lists no models; 'mine' is asked for all the same." in result.stderr
    assert [asked["model"] for asked in server.requests] == ["mine", "mine"]


def test_an_unknown_vocabulary_is_told() -> None:
    entry = {name: value for name, value in MODELS["data"][0].items() if name != "vocab_size"}  # type: ignore[index]
    with FakeServer(models={"data": [entry]}) as server:
        result = run("--url", server.url, "--num-requests", "2", "--warm-up", "0")
    assert "token ids below 1000 are used" in result.stderr
    with FakeServer(models={"data": [entry | {"meta": {"n_vocab": 20}}]}) as server:
        assert ask(server, num_requests=1).row["params"]["vocab_size"] == 20


@pytest.mark.parametrize("words", [("--input-len", "0"), ("--input-len", "9:3"), ("--output-len", "many")])
def test_wrong_lengths(words: tuple[str, str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "use 128 or 64:256" in result.stderr


def test_options_that_exclude_one_another(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("nonsense")
    assert "give one of them" in refusal("--rate", "1", "--trace", str(trace))
    assert "add a rate or a trace" in refusal("--duration", "5")
    assert "factors for a trace" in refusal("--time-scale", "2")
    with FakeServer() as server:
        assert f"the trace {trace} is refused, line 1" in refusal("--url", server.url, "--trace", str(trace))
