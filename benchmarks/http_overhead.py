"""What HTTP costs: output tokens a second through the server, beside the engine's own without it. One JSON row.

    python benchmarks/http_overhead.py [MODEL] [--concurrency 16] [--out rows.jsonl]

In each round the engine answers all requests offline, `--concurrency` of them together; then it is closed, and a server
in a process of its own, with the same options, answers as many that stream. Prompts are new in every round, so that no
prefix is found in a cache, but of a round the same for both. The client runs on the same machine: what it takes from
the server counts as overhead, and so does every neighbour, so leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from flexmoe import LLM, SamplingParams
from flexmoe.bench.endpoint import Endpoint, EndpointOptions
from flexmoe.bench.load import LoadOptions, Planned, plan, warm_up
from flexmoe.bench.record import append, facts, summary
from flexmoe.bench.serving import ServeOptions, measure
from flexmoe.bench.subject import Subject, open_subject
from flexmoe.errors import ConfigError, EngineError

Row = dict[str, Any]

_READY_SECONDS, _STOP_SECONDS = 300, 60
_ENGINE_OPTIONS = ("dtype", "device", "threads", "kv_cache_memory", "max_model_len")


class Bench:
    """One run: a model, what it is asked, and how engine and server are set up."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args
        given = {name: getattr(args, name) for name in _ENGINE_OPTIONS}
        self.options = {name: value for name, value in given.items() if value is not None}
        self.options |= {"load_format": subject.load_format, "max_num_seqs": args.concurrency}
        self.about: Row = {}
        self.device = torch.device("cpu")

    def row(self) -> Row:
        """Measure in rounds."""
        args = self.args
        offline, http = [], []
        for number in range(args.rounds):
            load = self._load(number)
            offline.append(self._offline(load))
            http.append(self._http(load))
            print(f"round {number}: offline {offline[-1]:.1f}, HTTP {http[-1]['output_tokens_per_s']:.1f} tokens/s")
        ratios = [row["output_tokens_per_s"] / alone for row, alone in zip(http, offline, strict=True)]
        result = {
            "offline_tokens_per_s": summary(offline),
            "http_tokens_per_s": summary([row["output_tokens_per_s"] for row in http]),
            "ratio": summary(ratios),
            "rounds": args.rounds,
            "http": http,
        }
        params = {
            name: getattr(args, name) for name in ("concurrency", "num_requests", "input_len", "output_len", "seed")
        }
        row = {"benchmark": "http_overhead", "engine": "flexmoe", "model": self.subject.facts(), "params": params}
        note = {"note": args.note} if args.note else {}
        return row | {"config": self.about, "result": result} | note | facts(self.device)

    def _load(self, number: int) -> LoadOptions:
        args = self.args
        return LoadOptions(
            num_requests=args.num_requests,
            input_len=(args.input_len, args.input_len),
            output_len=(args.output_len, args.output_len),
            warm_up=args.concurrency,
            seed=args.seed + number,
        )

    def _offline(self, load: LoadOptions) -> float:
        """Tokens a second of the engine alone."""
        vocab_size = self.subject.config.vocab_size
        prompts, before = ([_ids(request) for request in asked(load, vocab_size)] for asked in (plan, warm_up))
        params = SamplingParams(temperature=0, max_tokens=self.args.output_len, ignore_eos=True)
        with LLM(str(self.subject.folder), **self.options) as llm:
            self.about = llm.describe() | {"model": self.subject.name}
            self.device = llm.engine.local_runner.device
            llm.generate(before, params)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params)
            seconds = time.perf_counter() - start
        return sum(len(output.token_ids) for output in outputs) / seconds

    def _http(self, load: LoadOptions) -> Row:
        """What clients of a server see. Raises EngineError if a request fails: then there is nothing to compare."""
        with _server(self.subject, self.options) as url:
            options = ServeOptions(
                endpoint=EndpointOptions(url=url),
                load=load,
                concurrency=self.args.concurrency,
                vocab_size=self.subject.config.vocab_size,
            )
            result: Row = measure(options).row["result"]
        expected = self.args.num_requests * self.args.output_len
        if result["errors"] or result["output_tokens"] != expected:
            raise EngineError(f"the server gave {result['output_tokens']} tokens of {expected}: {result['errors']}.")
        return result


def _ids(request: Planned) -> list[int]:
    assert isinstance(request.prompt, list)
    return cast("list[int]", request.prompt)


@contextlib.contextmanager
def _server(subject: Subject, options: Row) -> Iterator[str]:
    """The URL of a server in another process, which ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "flexmoe", "serve", str(subject.folder), "--port", str(port), *words]
    with tempfile.TemporaryFile() as log, _ending(subprocess.Popen(command, stdout=log, stderr=log)) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            asyncio.run(_ready(url, process))
        except EngineError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        yield url


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End the process with the context: as it should, or else by force."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until it serves. Raises EngineError if it ends before, or takes too long."""
    end = time.monotonic() + _READY_SECONDS
    async with Endpoint(EndpointOptions(url=url)) as endpoint:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(ConfigError):
                await endpoint.served()
                return
            await asyncio.sleep(0.2)
    raise EngineError(f"the server did not start (exit status {process.poll()}, limit {_READY_SECONDS} s).")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="a folder or a name on the Hub; none: the built-in model")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--num-requests", type=int, default=128)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-cache-memory", type=int, help="bytes")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", help="goes into the row: what else the machine was doing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and append the row."""
    args = arguments(words)
    with open_subject(args.model, args.load_format) as subject:
        row = Bench(subject, args).row()
    result = row["result"]
    offline, http, ratio = (result[name]["median"] for name in ("offline_tokens_per_s", "http_tokens_per_s", "ratio"))
    print(
        f"{subject.label}, {args.concurrency} streams: offline {offline:.1f} tokens/s, through HTTP {http:.1f}, "
        f"ratio {ratio:.3f}"
    )
    if args.out:
        append(args.out, row)


if __name__ == "__main__":
    main()
