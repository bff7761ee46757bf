"""The suite: all that is measured of a model and chosen engines on this machine. Enters: SuiteOptions. Leaves: rows.

It is a list of jobs, each of which leaves one row. A row bears its job's name under `suite`, by which a later run with
the same file knows what is there; one that failed is tried again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flexmoe.bench import latency, profile, serving, throughput
from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.endpoint import EndpointOptions
from flexmoe.bench.hugging_face import import_transformers
from flexmoe.bench.latency import HF_DEFAULT, OURS, LatencyOptions
from flexmoe.bench.load import LoadOptions
from flexmoe.bench.own_server import own_server, why_not
from flexmoe.bench.peak import matrix_peak
from flexmoe.bench.profile import ProfileOptions
from flexmoe.bench.serving import ServeOptions
from flexmoe.bench.subject import Subject, open_subject
from flexmoe.bench.throughput import ThroughputOptions
from flexmoe.engine.device import choose_device, set_threads
from flexmoe.errors import ConfigError
from flexmoe.planner.recorded import Speed

Row = dict[str, Any]
Notify = Callable[[str], None]

_HF_BEST_SECONDS = 90.0
# What a job of the built-in model takes on two cores, to begin with; what jobs really take corrects it.
_EXPECTED = {"latency": 6.0, "profile": 4.0, "throughput": 8.0, "serving": 14.0}
_EXPECTED_HF = {"latency": 20.0, "throughput": 30.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """urls: OpenAI servers that run already. batches: of latency. concurrencies: streams at once of serving."""

    model: str | None = None
    load_format: str = "auto"
    engines: Sequence[str] = (OURS, HF_DEFAULT)
    urls: Sequence[str] = ()
    batches: Sequence[int] = (1, 8, 32)
    concurrencies: Sequence[int] = (1, 16)
    requests: int = 64
    prompt_len: int = 128
    output_len: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for engine in self.engines:
            if engine not in latency.ENGINES:
                raise ConfigError(f"engine={engine!r} is not one of {', '.join(latency.ENGINES)}.")

    @property
    def engine_options(self) -> Row:
        """What all of our engine's runs share."""
        return {name: getattr(self, name) for name in ("dtype", "device", "threads", "seed")}


@dataclass(frozen=True, slots=True)
class Job:
    """name: what a row bears. seconds: expected. run: leaves the row."""

    name: str
    seconds: float
    run: Callable[[], Row] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """Told before each job and after the last. left: seconds, as far as can be told. now: None at the end."""

    done: int
    total: int
    left: float
    now: str | None


def run(
    options: SuiteOptions, there: Sequence[Row], tell: Callable[[Progress], None], notify: Notify = lambda _: None
) -> Iterator[Row]:
    """Rows of jobs that are not among those that are there. notify: hears what cannot be measured, and why.

    Raises MissingDependencyError for transformers that are asked for and absent.
    """
    if set(options.engines) != {OURS}:
        import_transformers()
    done = {row["suite"] for row in there if "suite" in row and "error" not in row["result"]}
    with open_subject(options.model, options.load_format) as subject:
        jobs = [job for job in _jobs(options, subject, notify) if job.name not in done]
        expected, start = sum(job.seconds for job in jobs), time.monotonic()
        finished = 0.0
        for number, job in enumerate(jobs):
            pace = (time.monotonic() - start) / finished if finished else 1.0
            tell(Progress(number, len(jobs), (expected - finished) * pace, job.name))
            yield job.run() | {"suite": job.name}
            finished += job.seconds
        tell(Progress(len(jobs), len(jobs), 0.0, None))


def read(path: Path) -> list[Row]:
    """Rows of a file; none if it is not there. Raises ConfigError for a line that is no row."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{path} is no file of rows ({error}); name another as --out.") from error


def _jobs(options: SuiteOptions, subject: Subject, notify: Notify) -> list[Job]:
    lengths = f"{subject.label}, {options.prompt_len}+{options.output_len} tokens, {options.dtype}"
    lengths += f" on {choose_device(options.device).type}"
    jobs = [
        _job(f"latency, {engine}, batch {batch}, {lengths}", engine, _latency, options, subject, engine, batch)
        for engine in options.engines
        for batch in options.batches
    ]
    jobs += [
        _job(
            f"throughput, {engine}, requests {options.requests}, {lengths}",
            engine,
            _throughput,
            options,
            subject,
            engine,
        )
        for engine in options.engines
        if engine in throughput.ENGINES
    ]
    if OURS in options.engines:
        jobs += [
            _job(f"profile, {OURS}, batch {batch}, {lengths}", OURS, _profile, options, subject, batch)
            for batch in options.batches
        ]
    reason = why_not(subject) if OURS in options.engines else None
    if reason:
        notify(f"not measured: {reason}.")
    served = [None] * (OURS in options.engines and reason is None) + list(options.urls)
    for url in served:
        who = url or OURS
        jobs += [
            _job(f"serving, {who}, streams {streams}, {lengths}", OURS, _serving, options, subject, url, streams)
            for streams in options.concurrencies
        ]
    return jobs


def _job(name: str, engine: str, run: Callable[..., Row], *arguments: Any) -> Job:
    kind = name.partition(",")[0]
    expected = _EXPECTED[kind] if engine == OURS else _EXPECTED_HF[kind]
    if engine == latency.HF_BEST:
        expected += _HF_BEST_SECONDS
    return Job(name, expected, lambda: run(*arguments))


def _latency(options: SuiteOptions, _: Subject, engine: str, batch: int) -> Row:
    """Of another engine beside ours, so that its tokens are compared; ours is then a job of its own."""
    asked = LatencyOptions(
        model=options.model,
        load_format=options.load_format,
        engines=tuple(dict.fromkeys((OURS, engine))),
        batches=(batch,),
        prompt_len=options.prompt_len,
        output_len=options.output_len,
        hf_seconds=_HF_BEST_SECONDS,
        **options.engine_options,
    )
    return next(row for row in latency.measure(asked) if row["engine"] == engine)


def _throughput(options: SuiteOptions, subject: Subject, engine: str) -> Row:
    asked = ThroughputOptions(
        engine=engine,
        requests=options.requests,
        prompt_len=options.prompt_len,
        output_len=options.output_len,
        **options.engine_options,
    )
    return throughput.measure(subject, asked)


def _profile(options: SuiteOptions, _: Subject, batch: int) -> Row:
    asked = ProfileOptions(
        model=options.model,
        load_format=options.load_format,
        batch=batch,
        prompt_len=options.prompt_len,
        **options.engine_options,
    )
    return profile.measure(asked).row


def _serving(options: SuiteOptions, subject: Subject, url: str | None, streams: int) -> Row:
    """A server that runs already, or ours, started for this."""
    asked = ServeOptions(
        endpoint=EndpointOptions(url=url or "http://127.0.0.1"),
        load=LoadOptions(
            num_requests=max(2 * streams, 8),
            input_len=(options.prompt_len, options.prompt_len),
            output_len=(options.output_len, options.output_len),
            warm_up=streams,
            seed=options.seed + streams,  # other prompts for each number of streams: none is in a cache yet
        ),
        concurrency=streams,
    )
    if url is not None:
        return serving.measure(asked).row
    words = ["--dtype", options.dtype, "--device", options.device, "--max-num-seqs", str(max(options.concurrencies))]
    words += ["--threads", str(options.threads)] if options.threads else []
    with own_server(subject, words) as own:
        asked = replace(asked, endpoint=EndpointOptions(url=own), vocab_size=subject.config.vocab_size)
        row = serving.measure(asked).row | {"engine": OURS}
    # Only now, when nobody else computes on this device and its memory is free.
    set_threads(options.threads)
    device, dtype = choose_device(options.device), getattr(torch, row["config"]["engine"]["dtype"])
    return serving.with_floor(row, Speed(read_bandwidth(device), matrix_peak(device, dtype)), subject.config)
