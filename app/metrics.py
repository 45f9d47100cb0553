"""Prometheus metrics of one gateway; labels are ids and closed sets, never text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.records import Turn

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GUARD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1, 5)


class Metrics:
    """The counters of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("newel_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.in_flight = Gauge("newel_requests_in_flight", "HTTP requests being answered", registry=registry)
        self.turns = Counter("newel_turns", "Turns answered", ["tenant", "policy", "action"], registry=registry)
        self.turn_errors = Counter("newel_turn_errors", "Turns that ended in an error", ["error"], registry=registry)
        self.hits = Counter(
            "newel_rule_hits", "Rules that fired", ["policy", "stage", "rule", "action", "mode"], registry=registry
        )
        self.broken = Counter(
            "newel_rule_broken", "Rules that broke; action is what decided", ["policy", "rule", "action"], registry=registry
        )
        self.guard = Histogram(
            "newel_guard_seconds", "Time spent judging a turn", ["stage"], buckets=GUARD_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "newel_first_token_seconds", "From request to the engine's first token", buckets=SECONDS, registry=registry
        )
        self.duration = Histogram("newel_turn_seconds", "From request to the end", buckets=SECONDS, registry=registry)
        self.tokens = Counter("newel_tokens", "Tokens", ["tenant", "direction"], registry=registry)
        self.tickets = Counter("newel_tickets", "Turns handed to a person", ["queue", "priority"], registry=registry)
        self.feedback = Counter("newel_feedback", "Judgements by people", ["kind"], registry=registry)
        self.spilled = Counter("newel_turns_spilled", "Turn records written to the spill file", registry=registry)
        self.replayed = Counter("newel_turns_replayed", "Spilled records brought into the database", registry=registry)
        self.lost = Counter("newel_turns_lost", "Turn records that could be stored nowhere", registry=registry)
        self.store_errors = Counter("newel_store_errors", "Failed database operations", registry=registry)
        self.deliveries = Counter("newel_deliveries", "Webhook deliveries", ["outcome"], registry=registry)
        self.engine_ready = Gauge("newel_engine_ready", "1 when the engine answers", registry=registry)
        self.engine_restarts = Gauge("newel_engine_restarts", "Restarts of the supervised engine", registry=registry)

    def count(self, turn: Turn) -> None:
        """Counts a finished turn."""
        policy = turn.policy.partition("@")[0]
        self.turns.labels(turn.tenant, policy, turn.action).inc()
        if turn.error:
            self.turn_errors.labels(turn.error).inc()
        for stage, hit in turn.hits:
            self.hits.labels(policy, stage, hit.rule, hit.action.word, hit.mode).inc()
            if hit.broken:
                self.broken.labels(policy, hit.rule, hit.action.word).inc()
        if turn.first_token_ms is not None:
            self.first_token.observe(turn.first_token_ms / 1000)
        if turn.total_ms is not None:
            self.duration.observe(turn.total_ms / 1000)
        self.tokens.labels(turn.tenant, "prompt").inc(turn.prompt_tokens)
        self.tokens.labels(turn.tenant, "completion").inc(turn.completion_tokens)
        if turn.ticket:
            self.tickets.labels(turn.ticket.queue, turn.ticket.priority).inc()

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
