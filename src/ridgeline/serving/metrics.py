"""Prometheus metrics of one endpoint: vLLM's names where they exist (dashboards and gateways key off them), ours beside.

Counters are kept once: what the engine counts is read from its statistics when scraped, what HTTP sees is counted
here. Every app has its own registry, so two servers in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ridgeline import __version__
from ridgeline.serving.engine_thread import EngineThread

_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 4, 8, 15, 30, 60, 120)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 5)
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
# finish reasons of ours -> vLLM's label
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
# engine statistic -> (metric, help)
_GAUGES = {
    "running": ("vllm:num_requests_running", "Sequences in the running batch."),
    "waiting": ("vllm:num_requests_waiting", "Sequences accepted and not yet in the batch."),
    "kv_usage": ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1."),
}
_COUNTERS = {
    "preemptions": ("vllm:num_preemptions", "Sequences put back to wait for KV space."),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "decode_steps": ("ridgeline_decode_steps", "Engine steps that decoded."),
    "decode_tokens": ("ridgeline_decode_tokens", "Rows of those steps: tokens made by decoding, not by prefill."),
    "decode_bytes": ("ridgeline_decode_bytes", "Weights and resident cache those steps had to read."),
    "decode_seconds": ("ridgeline_decode_seconds", "Seconds spent in them, sampling included."),
    "prefill_seconds": ("ridgeline_prefill_seconds", "Seconds spent computing prompts."),
}


class Metrics:
    """The counters and histograms of one app; ``render`` writes the text format."""

    def __init__(self, model: str, thread: EngineThread, draining: Any) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success",
            "Finished sequences by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        for reason in _REASONS.values():
            self._success.labels(model, reason)  # exported at zero from the start
        self.rejections = self._counter("vllm:admission_rejections", "Requests answered 429 because the queue is full.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST)
        self.gap = self._histogram("vllm:inter_token_latency_seconds", "Gap between tokens of a sequence.", _GAP)
        self.per_token = self._histogram("vllm:request_time_per_output_token_seconds", "Mean gap of a request.", _GAP)
        self.total = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to the end of the request.", _LONG)
        self.queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to the first step it is in.", _FIRST)
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", "First step to first token.", _FIRST)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "First token to last.", _LONG)
        self.step = self._histogram("ridgeline_engine_step_seconds", "Length of an engine step.", _GAP)
        self._responses = Counter(
            "ridgeline_http_responses", "HTTP answers.", ("route", "status"), registry=self.registry
        )
        self.registry.register(_EngineCollector(model, thread, draining))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name",), registry=self.registry).labels(self.model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry).labels(self.model)

    def finished(self, reason: str) -> None:
        """One sequence ended for ``reason``."""
        self._success.labels(self.model, _REASONS.get(reason, "error")).inc()

    def answered(self, route: str, status: int) -> None:
        """One HTTP answer; ``route`` is a known path or "other", so the label set is bounded."""
        self._responses.labels(route, str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _EngineCollector:
    """Reads the engine's own numbers at scrape time."""

    def __init__(self, model: str, thread: EngineThread, draining: Any) -> None:
        self._model = model
        self._thread = thread
        self._draining = draining

    def collect(self) -> Iterable[Metric]:
        """All engine gauges and counters, with the model's label."""
        stats = self._thread.stats
        for key, (name, text) in _GAUGES.items():
            yield self._gauge(name, text, float(stats.get(key, 0)))
        for key, (name, text) in _COUNTERS.items():
            if key in stats:
                counter = CounterMetricFamily(name, text, labels=("model_name",))
                counter.add_metric((self._model,), float(stats[key]))
                yield counter
        if self._thread.read_ceiling is not None:
            text = "Measured memory read bandwidth."
            yield self._gauge("ridgeline_read_ceiling_bytes_per_second", text, self._thread.read_ceiling)
        yield self._gauge("ridgeline_open_sequences", "Sequences not finished.", self._thread.open_sequences)
        yield self._gauge("ridgeline_queue_capacity", "Sequences that may be open.", self._thread.capacity)
        age = self._thread.last_step_age()
        yield self._gauge("ridgeline_engine_step_age_seconds", "Age of the step in progress, 0 when idle.", age)
        alive = self._thread.health()["alive"]
        yield self._gauge("ridgeline_alive", "1 while the engine can answer.", float(alive))
        yield self._gauge("ridgeline_draining", "1 after SIGTERM.", float(self._draining()))
        info = GaugeMetricFamily("ridgeline_build_info", "Always 1.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=("model_name",))
        gauge.add_metric((self._model,), value)
        return gauge
