"""What the server counts, in Prometheus' form; of requests and tokens only, never of what was said."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_vlm_mini.generation.answering import Stats

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server.

    Attributes:
        requests: by interface and status.
        busy: requests that wait or are answered.
        first_token: seconds to the first token, by model.
        loaded: 1 for each model that is loaded, else 0.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, own = "mlx_vlm_mini", self.registry
        self.requests = Counter(f"{name}_requests", "Requests by route and status", ["route", "status"], registry=own)
        self.busy = Gauge(f"{name}_busy", "Requests that wait or are answered", registry=own)
        self.loaded = Gauge(f"{name}_model_loaded", "Whether a model is loaded", ["model"], registry=own)
        self.first_token = Histogram(
            f"{name}_first_token_seconds", "Seconds to the first token", ["model"], buckets=_SECONDS, registry=own
        )
        self._tokens = Counter(f"{name}_tokens", "Tokens by kind", ["model", "kind"], registry=own)

    def count(self, model: str, stats: Stats) -> None:
        """Count what an answer cost."""
        for kind, tokens in (
            ("prompt", stats.prompt_tokens), ("cached", stats.cached_tokens), ("image", stats.image_tokens),
            ("generated", stats.generated_tokens),
        ):  # fmt: skip
            self._tokens.labels(model, kind).inc(tokens)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
