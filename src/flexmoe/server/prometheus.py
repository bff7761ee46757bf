"""GET /metrics. Enters: what the engine counted. Leaves: Prometheus' text; the names are in docs/server.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from flexmoe import __version__
from flexmoe.engine.metrics import Histogram
from flexmoe.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "flexmoe_"


def page(service: Service) -> bytes:
    """All figures of now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(service))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service
        self._labels = {"model": service.name}

    def collect(self) -> Iterator[Metric]:
        """Called once for each page."""
        yield from self._state()
        yield from self._counters()
        yield from self._histograms()
        yield from self._experts()
        yield from self._drift()
        http = CounterMetricFamily(_PREFIX + "http_requests", "HTTP requests.", labels=["route", "status"])
        for (route, status), count in list(self._service.http.items()):
            http.add_metric([route, str(status or "disconnected")], count)
        yield http

    def _state(self) -> Iterator[Metric]:
        scheduler = self._service.engine.engine.scheduler
        blocks = scheduler.blocks
        yield self._gauge("info", "Version and model.", 1, version=__version__)
        engine = self._service.engine
        well = engine.error is None and engine.hang is None
        yield self._gauge("engine_up", "1 while the engine lives and does not hang.", int(well))
        yield self._gauge("step_running_seconds", "Age of the step in progress.", engine.running_seconds)
        yield self._gauge("requests_running", "Samples that are being computed.", scheduler.num_running)
        yield self._gauge("requests_waiting", "Samples that wait for a place.", scheduler.num_waiting)
        yield self._gauge("kv_cache_blocks", "Blocks of the KV cache.", blocks.num_blocks)
        used = 1 - blocks.num_free / blocks.num_blocks
        yield self._gauge("kv_cache_usage_ratio", "Share of the blocks that requests hold.", used)
        stats = blocks.stats
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.queried_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found there.", stats.hit_tokens)

    def _counters(self) -> Iterator[Metric]:
        metrics = self._service.engine.engine.metrics
        yield self._counter("steps", "Steps of the engine.", metrics.steps)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that began.", metrics.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", metrics.generated_tokens)
        yield self._counter("preemptions", "Samples that lost their blocks to others.", metrics.preemptions)
        finished = CounterMetricFamily(
            _PREFIX + "requests_finished", "Samples that ended, by reason.", labels=["model", "finish_reason"]
        )
        for reason, count in list(metrics.finished.items()):
            finished.add_metric([self._service.name, reason], count)
        yield finished

    def _histograms(self) -> Iterator[Metric]:
        metrics = self._service.engine.engine.metrics
        for name, what, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", metrics.ttft),
            ("inter_token_latency_seconds", "Gaps between tokens of a sample.", metrics.itl),
            ("time_per_output_token_seconds", "Mean gap of a finished sample.", metrics.tpot),
            ("e2e_request_latency_seconds", "Arrival to the end.", metrics.e2e),
            ("request_queue_time_seconds", "Arrival to the first step of the request.", metrics.queue),
        ):
            yield self._histogram(name, what, histogram)

    def _experts(self) -> Iterator[Metric]:
        experts = self._service.engine.experts
        labels = ["model", "layer"]
        chosen = CounterMetricFamily(
            _PREFIX + "expert_tokens", "Tokens that chose an expert, in sampled steps.", labels=[*labels, "expert"]
        )
        imbalance = GaugeMetricFamily(
            _PREFIX + "expert_imbalance_ratio", "Busiest over mean expert of a layer.", labels=labels
        )
        active = GaugeMetricFamily(_PREFIX + "experts_active", "Experts read by a pass, on average.", labels=labels)
        for layer, load in experts.loads.items():
            place = [self._service.name, str(layer)]
            for expert, count in enumerate(load.counts):
                chosen.add_metric([*place, str(expert)], count)
            imbalance.add_metric(place, experts.imbalance(layer))
            active.add_metric(place, load.mean_active)
        yield from (chosen, imbalance, active)

    def _drift(self) -> Iterator[Metric]:
        """Only of an engine that was planned for a machine."""
        drift = self._service.engine.engine.drift
        if drift is not None:
            yield self._counter(
                "step_seconds_predicted", "Seconds that the steps were predicted to take.", drift.predicted
            )
            yield self._counter("step_seconds_measured", "Seconds that they took.", drift.measured)
            what = "Median of measured over predicted time, of the last steps."
            yield self._gauge("step_time_ratio", what, drift.ratio)

    def _gauge(self, name: str, what: str, value: float, **labels: str) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, what, labels=["model", *labels])
        family.add_metric([self._service.name, *labels.values()], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, what, labels=["model"])
        family.add_metric([self._service.name], value)
        return family

    def _histogram(self, name: str, what: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(_PREFIX + name, what, labels=["model"])
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric([self._service.name], buckets, histogram.total)
        return family
