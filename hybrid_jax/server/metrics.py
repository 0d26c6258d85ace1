"""Metrics in Prometheus' text form: the engine's statistics and times of requests.

Names begin with `vllm:` where that server has the metric, so that existing boards work, else with `hybrid_jax_`.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrid_jax.server.record import Record
from hybrid_jax.stats import BucketUse, Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
SERVED = ("stop", "length", "length+stop")  # reasons of requests that were answered in full


class Metrics:
    """Counters of HTTP requests; those of the engine are read off its statistics when somebody asks."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._model = model
        names = ("model_name",)
        self._success = Counter("vllm:request_success", "Answered requests", (*names, "finished_reason"), registry=None)
        self._finished = Counter("hybrid_jax_requests_finished", "HTTP requests", ("reason",), registry=None)
        self._read = Counter("vllm:prompt_tokens", "Prompt tokens, cached ones too", names, registry=None)
        self._cached = Counter("vllm:prompt_tokens_cached", "Prompt tokens not computed again", names, registry=None)
        self._first = Histogram(
            "vllm:time_to_first_token_seconds", "Until a token", names, buckets=SECONDS, registry=None
        )
        self._whole = Histogram("vllm:e2e_request_latency_seconds", "In all", names, buckets=SECONDS, registry=None)
        self._each = Histogram(
            "vllm:request_time_per_output_token_seconds", "Per token", names, buckets=SECONDS, registry=None
        )
        self._prompt = Histogram("vllm:request_prompt_tokens", "Of a prompt", names, buckets=TOKENS, registry=None)
        self._output = Histogram("vllm:request_generation_tokens", "Of an answer", names, buckets=TOKENS, registry=None)
        for metric in (
            *(self._success, self._finished, self._read, self._cached, self._first),
            *(self._whole, self._each, self._prompt, self._output),
        ):
            self._registry.register(metric)

    def watch(self, look: Callable[[], Stats]) -> None:
        """Read the engine's part off the newest of its statistics."""
        self._registry.register(_EngineMetrics(self._model, look))

    def observe(self, record: Record, now_s: float) -> None:
        """Count a request that is over."""
        self._finished.labels(record.reason).inc()
        if record.reason not in SERVED:
            return
        name = self._model
        self._success.labels(name, record.reason).inc()
        self._read.labels(name).inc(record.prompt_tokens)
        self._cached.labels(name).inc(record.cached_tokens)
        self._first.labels(name).observe(record.first_token_s - record.began_s)
        self._whole.labels(name).observe(now_s - record.began_s)
        self._prompt.labels(name).observe(record.prompt_tokens)
        self._output.labels(name).observe(record.output_tokens)
        if record.output_tokens > record.choices:
            decoding_s = record.last_token_s - record.first_token_s
            self._each.labels(name).observe(decoding_s / (record.output_tokens - record.choices))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)


class _EngineMetrics(Collector):
    """What an engine says of itself, read at each scrape."""

    def __init__(self, model: str, look: Callable[[], Stats]):
        self._model, self._look = model, look

    def collect(self) -> Iterator[Metric]:
        """Gauges, then counters, then what has a label of its own."""
        stats = self._look()
        pages = stats.pages.used + stats.pages.evictable + stats.pages.free
        gauges = {
            "vllm:num_requests_running": stats.running,
            "vllm:num_requests_waiting": stats.waiting,
            "vllm:kv_cache_usage_perc": stats.pages.used / pages if pages else 0.0,
            "hybrid_jax_step_seconds": stats.step_s,
            "hybrid_jax_step_host_seconds": stats.host_s,
        }
        counters = {
            "vllm:prefix_cache_queries": stats.cache.looked_up_tokens,
            "vllm:prefix_cache_hits": stats.cache.hit_tokens,
            "hybrid_jax_prompt_tokens_computed": stats.prompt_tokens,
            "vllm:generation_tokens": stats.generated_tokens,
            "vllm:num_preemptions": stats.preemptions,
            "hybrid_jax_steps": stats.steps,
            "hybrid_jax_compilations": stats.compilations,
            "hybrid_jax_compilations_after_ready": stats.compiled_after_ready,
        }
        for name, value in gauges.items():
            yield _labelled(GaugeMetricFamily(name, name, labels=["model_name"]), {self._model: value})
        for name, value in counters.items():
            yield _labelled(CounterMetricFamily(name, name, labels=["model_name"]), {self._model: value})
        for name, units in (("pages", stats.pages), ("state_slots", stats.slots)):
            states = {"used": units.used, "evictable": units.evictable, "free": units.free}
            yield _labelled(
                GaugeMetricFamily(f"hybrid_jax_{name}", f"By who holds them: {name}", labels=["state"]), states
            )
        blocked = CounterMetricFamily("hybrid_jax_blocked", "Times that the first in line lacked it", labels=["lack"])
        yield _labelled(blocked, stats.blocked)
        yield self._padding(stats)

    def _padding(self, stats: Stats) -> Metric:
        padding = GaugeMetricFamily("hybrid_jax_padding_ratio", "Padding, by shape", labels=["bucket"])
        shapes = {_shape(use): use.padding_ratio for use in stats.buckets if use.steps}
        return _labelled(padding, shapes)


def _shape(use: BucketUse) -> str:
    return f"{use.rows}x{use.tokens}x{use.pages}" + ("-likeliest" if use.likeliest else "")


def _labelled[Family: (GaugeMetricFamily, CounterMetricFamily)](family: Family, values: Mapping[str, float]) -> Family:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
