"""What Prometheus reads of the service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("vila_m3_requests", "Requests answered", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "vila_m3_request_seconds", "Time of a request", ["route"], buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "vila_m3_first_token_seconds",
            "From the arrival of a chat request to the first piece of text",
            buckets=_SECONDS,
            registry=registry,
        )
        self.expert_seconds = Histogram(
            "vila_m3_expert_seconds", "Runs of experts", ["expert", "outcome"], buckets=_SECONDS, registry=registry
        )
        self.tokens = Counter("vila_m3_tokens", "Tokens of the VLM", ["kind"], registry=registry)
        self.batch = Histogram(
            "vila_m3_batch_size", "Turns answered at once", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.running = Gauge("vila_m3_running", "Conversations that are worked on", registry=registry)
        self.waiting = Gauge("vila_m3_waiting", "Conversations that wait", registry=registry)
        self.kept = Gauge("vila_m3_kept_conversations", "Conversations in memory", registry=registry)
        self.store_bytes = Gauge("vila_m3_store_bytes", "Bytes of all files", registry=registry)

    def render(self) -> bytes:
        """Return all figures in Prometheus' text form."""
        return generate_latest(self.registry)
