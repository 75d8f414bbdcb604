"""What the endpoint measures of itself, in Ray's metrics: Prometheus reads them at every node's metrics port.

Shares are quotients of counters: that of unknown users, ``rate(ray_llm4msr_unknown_users_total[5m]) /
rate(ray_llm4msr_requests_total[5m])``.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Histogram

BOUNDARIES_MS = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
BOUNDARIES_CANDIDATES = [1, 10, 50, 100, 200, 500, 1000, 2000]
BOUNDARIES_SCORE = [1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.5]


class Metrics:
    """Counts and histograms by scenario; told of every answer by `serve.gate.Gate`."""

    def __init__(self) -> None:
        def counter(name: str, description: str, *tags: str) -> Counter:
            return Counter(f"llm4msr_{name}", description, ("scenario", *tags))

        def histogram(name: str, description: str, boundaries: list[float]) -> Histogram:
            return Histogram(f"llm4msr_{name}", description, boundaries, ("scenario",))

        self.answers = Counter("llm4msr_answers", "Answers by path and HTTP status", ("path", "status"))
        self.requests = counter("requests", "Rankings, each user of a batch counted", "model_version")
        self.unknown_users = counter("unknown_users", "Rankings for users whom the model does not know")
        self.without_knowledge = counter("without_knowledge", "Rankings without knowledge of the user")
        self.candidates = counter("candidates", "Candidates that were scored")
        self.unknown_items = counter("unknown_items", "Candidates that the model does not know")
        self.shadow_first = counter("shadow_other_first", "Rankings whose shadow has another item first")
        self.num_candidates = histogram("num_candidates", "Candidates of a ranking", BOUNDARIES_CANDIDATES)
        self.shadow = histogram("shadow_difference", "Largest difference of a score to the shadow's", BOUNDARIES_SCORE)
        self.parts = {
            name: histogram(f"{name}_ms", f"Milliseconds of a ranking: {what}", BOUNDARIES_MS)
            for name, what in {
                "encode": "raw ids and values to the model's input",
                "knowledge": "the user's meta layers",
                "model": "the model's input to scores",
                "total": "all of it",
            }.items()
        }

    def __call__(self, record: dict[str, Any]) -> None:
        """Counts one answer: the record that is logged."""
        self.answers.inc(1, {"path": record["path"] or "other", "status": str(record["status"])})
        for ranking in record.get("rankings", ()):
            of = {"scenario": ranking["scenario"]}
            self.requests.inc(1, {**of, "model_version": ranking["model_version"]})
            self.num_candidates.observe(ranking["num_candidates"], of)
            self.candidates.inc(ranking["num_candidates"], of)
            for counter, number in (
                (self.unknown_users, not ranking["user_known"]),
                (self.without_knowledge, not ranking["knowledge_known"]),
                (self.unknown_items, ranking["num_unknown_items"]),
            ):
                if number:
                    counter.inc(int(number), of)
            for name, value in ranking["timings_ms"].items():
                self.parts[name].observe(value, of)
            if shadow := ranking.get("shadow"):
                self.shadow.observe(shadow["max_difference"], of)
                if not shadow["same_first"]:
                    self.shadow_first.inc(1, of)
