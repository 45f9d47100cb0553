"""Prometheus metrics of one gateway; labels are ids and closed sets, never text."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.records import DeliveryState, Turn
from app.store.writer import TurnWriter
from app.tracing import Steps
from guardrails.types import Action

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GUARD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1, 5)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The counters of one app, in a registry of its own; docs/metrics.md explains them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"newel_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"newel_{name}", what, labels, registry=self.registry)

        def seconds(name: str, what: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"newel_{name}_seconds", what, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "HTTP requests", "route", "status")
        self.answering = 0
        """HTTP requests being answered."""
        self.in_flight = gauge("requests_in_flight", "HTTP requests being answered")
        self.in_flight.set_function(lambda: self.answering)
        self.turns = counter("turns", "Turns that ended", "tenant", "policy", "action")
        self.turn_errors = counter("turn_errors", "Turns that ended in an error", "error")
        self.hits = counter("rule_hits", "Rules that fired", "policy", "stage", "rule", "action", "mode")
        self.broken = counter("rule_broken", "Rules that broke; action is what decided", "policy", "rule", "action")
        self.shadow = counter(
            "shadow_changes", "Turns that a rule in shadow mode would have changed", "policy", "stage", "rule", "action"
        )
        self.policy_stale = gauge("policy_stale", "1 while a policy cannot follow its new version or parent", "policy")
        self.guard = seconds("guard", "Time spent judging a turn", "stage", buckets=GUARD_SECONDS)
        self.guard_models = counter("guard_model_requests", "Questions to guard models", "model", "outcome")
        self.guard_model_time = seconds("guard_model", "Time for an answer of a guard model", "model")
        self.guard_breaker = gauge("guard_model_breaker_open", "1 while a guard model is left alone", "model")
        self.forged = counter("forged_histories", "Turns whose history holds replies that this service never gave")
        self.engine_up = gauge("pool_engine_up", "1 while an engine of a pool gets requests", "pool", "engine")
        self.engine_in_flight = gauge("pool_engine_in_flight", "Requests that an engine has", "pool", "engine")
        self.engine_requests = counter(
            "pool_engine_requests", "Requests to engines that ended", "pool", "engine", "outcome"
        )
        self.shadow_requests = counter("shadow_requests", "Copies for shadow releases", "model", "outcome")
        self.admission_running = gauge("admission_running", "Requests that a pool's queue has let through", "pool")
        self.admission_queued = gauge("admission_queued", "Requests that wait before a pool", "pool", "class")
        self.admission_shed = counter(
            "admission_shed", "Requests that a pool's queue turned away", "pool", "class", "reason"
        )
        self.admission_wait = seconds("admission_wait", "Time in the queue of a pool", "pool", "class")
        self.first_token = seconds("first_token", "From the request to the engine's first token")
        self.duration = seconds("turn", "From the request to the end of the reply")
        self.token_time = seconds(
            "token", "Mean time between the tokens of a streamed reply, one value a reply", buckets=TOKEN_SECONDS
        )
        self.overhead = seconds("overhead", "What a turn took beside waiting for its engine", buckets=GUARD_SECONDS)
        self.tokens = counter("tokens", "Tokens", "tenant", "direction")
        self.tickets = counter("tickets", "Turns handed to a person", "queue", "priority")
        self.feedback = counter("feedback", "Judgements by people", "kind")
        self.store_errors = counter("store_errors", "Times that the database was found down while a turn ran")
        self.written = counter("turns_written", "Turn records written to the database")
        self.batches = counter("turn_batches", "Transactions that wrote turn records")
        self.spilled = counter("turns_spilled", "Turn records written to the spill")
        self.lost = counter("turns_lost", "Turn records that could be stored nowhere")
        self.rejected = counter("turns_rejected", "Turn records that the database turned down, put aside on the disk")
        self.queued = gauge("turns_queued", "Turn records in memory, about to be written")
        self.waiting = gauge("turns_waiting", "Turn records in the spill, waiting for the database")
        self.deliveries = gauge("deliveries", "Webhook deliveries", "state")
        self.auth_failures = counter("auth_failures", "Requests that were not let in", "reason")
        self.auth_stale = counter("auth_stale", "Requests let in by a key as it was before the database failed")
        self.jwks = counter("jwks_fetches", "Look-ups of the token issuer's keys", "outcome")
        self.engine_ready = gauge("engine_ready", "1 while the engine answers")
        self.engine_restarts = gauge("engine_restarts", "Restarts of the supervised engine")
        self.limit_refusals = counter("limit_refusals", "Requests that a limit of their key turned down", "limit")
        self.limits_failed = counter("limits_failed", "Calls that the ledger did not answer", "call", "outcome")
        self.limits_down = gauge("limits_down", "1 while the ledger of limits does not answer")

        self._answers: dict[tuple[str, int], Counter] = {}
        self._children: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self._guarded = {stage: self.guard.labels(stage) for stage in ("input", "output")}

    def answered(self, route: str, status: int) -> None:
        """Counts an HTTP request."""
        counter = self._answers.get((route, status))
        if counter is None:
            counter = self._answers[route, status] = self.requests.labels(route, str(status))
        counter.inc()

    def guarded(self, stage: str, seconds: float) -> None:
        """Notes how long a turn's input or output was judged."""
        self._guarded[stage].observe(seconds)

    def count(self, turn: Turn, steps: Steps | None = None) -> None:
        """Counts a finished turn; `steps` tell how long it waited for an engine."""
        policy = turn.policy.partition("@")[0]
        self._of(self.turns, turn.tenant, policy, turn.action).inc()
        if turn.error:
            self._of(self.turn_errors, turn.error).inc()
        if turn.input or turn.output:
            self._count_hits(turn, policy)
        self._time(turn, steps)
        if turn.prompt_tokens:
            self._of(self.tokens, turn.tenant, "prompt").inc(turn.prompt_tokens)
        if turn.completion_tokens:
            self._of(self.tokens, turn.tenant, "completion").inc(turn.completion_tokens)
        if turn.ticket and turn.ticket.turn == turn.id:
            self._of(self.tickets, turn.ticket.queue, turn.ticket.priority).inc()

    def _count_hits(self, turn: Turn, policy: str) -> None:
        for stage, hit in turn.hits:
            action = hit.action.word
            self._of(self.hits, policy, stage, hit.rule, action, hit.mode).inc()
            if hit.broken:
                self._of(self.broken, policy, hit.rule, action).inc()
            if hit.mode == "shadow" and hit.action > Action[turn.action.upper()]:
                self._of(self.shadow, policy, stage, hit.rule, action).inc()

    def _time(self, turn: Turn, steps: Steps | None) -> None:
        first, total = turn.first_token_ms, turn.total_ms
        if first is not None:
            self.first_token.observe(first / 1000)
        if total is None:
            return
        self.duration.observe(total / 1000)
        if first is not None and turn.streamed and turn.completion_tokens > 1:
            self.token_time.observe((total - first) / (turn.completion_tokens - 1) / 1000)
        if steps is not None:
            self.overhead.observe(max(0.0, total / 1000 - steps.waited))

    def _of(self, counter: Counter, *labels: str) -> Counter:
        """`counter.labels(...)`, which by itself takes a lock and more each time."""
        child = self._children.get((counter, labels))
        if child is None:
            child = self._children[counter, labels] = counter.labels(*labels)
        return child

    def watch(self, writer: TurnWriter) -> None:
        """Counts from now on what becomes of the turns that are logged."""
        counters: dict[str, Counter] = {
            "written": self.written,
            "batches": self.batches,
            "spilled": self.spilled,
            "lost": self.lost,
            "rejected": self.rejected,
        }
        writer.told = lambda what, more: counters[what].inc(more)
        self.queued.set_function(lambda: writer.waiting)

    def count_deliveries(self, states: Mapping[DeliveryState, int]) -> None:
        """Notes how many webhook deliveries are in each state."""
        for state, number in states.items():
            self.deliveries.labels(state).set(number)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
