"""An engine's figures in the text form of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from paxattn.serving import EngineStats, Histogram

_GAUGES = {
    "requests_running": ("Requests that have a row", "running"),
    "requests_waiting": ("Requests that wait for a row", "waiting"),
    "pages": ("Pages in the pool", "num_pages"),
    "pages_in_rows": ("Pages that running requests hold", "pages_in_rows"),
    "pages_shared": ("Pages that several running requests hold", "pages_shared"),
    "pages_cached": ("Pages that only the prefix cache holds", "pages_cached"),
    "utilization_ratio": ("Slots of running requests' pages that hold tokens", "utilization"),
    "prefix_hit_ratio": ("Tokens looked up that pages held already", "prefix_hit_rate"),
    "tokens_per_second": ("Tokens generated in the last ten seconds", "tokens_per_second"),
}
_COUNTERS = {
    "steps": ("Device steps", "num_steps"),
    "preemptions": ("Times a running request gave its pages back", "preemptions"),
    "prompt_tokens": ("Tokens of prompts", "prompt_tokens"),
    "generated_tokens": ("Tokens generated", "generated_tokens"),
    "looked_up_tokens": ("Tokens that the prefix cache was asked for", "looked_up_tokens"),
    "cached_tokens": ("Tokens that pages held already", "cached_tokens"),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token", "time_to_first_token"),
    "inter_token_latency_seconds": ("Between two tokens of a request", "inter_token_latency"),
}


def prometheus_text(stats: EngineStats) -> str:
    """All of it, by names that begin with ``paxattn_``."""
    registry = CollectorRegistry()
    registry.register(_Figures(stats))
    return generate_latest(registry).decode()


class _Figures(Collector):
    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, (what, field) in _GAUGES.items():
            yield GaugeMetricFamily(f"paxattn_{name}", what, getattr(self._stats, field))
        for name, (what, field) in _COUNTERS.items():
            yield CounterMetricFamily(f"paxattn_{name}", what, getattr(self._stats, field))
        ended = CounterMetricFamily("paxattn_requests", "Requests that ended", labels=["reason"])
        for reason, count in self._stats.finished.items():
            ended.add_metric([reason], count)
        yield ended
        for name, (what, field) in _HISTOGRAMS.items():
            times: Histogram = getattr(self._stats, field)
            bounds = [*map(str, times.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(times.counts), strict=True))
            yield HistogramMetricFamily(f"paxattn_{name}", what, buckets, times.total)
