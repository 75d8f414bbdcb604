"""Exact metrics of the trained runs, and the item-mean baseline: ``python -m jobs.evaluate --config FILE.toml``."""

from __future__ import annotations

import logging
import sys
from typing import Any

from jobs.report import print_table
from jobs.session import run_job
from llm4msr import logs, storage
from llm4msr.config import Config

logger = logging.getLogger("llm4msr.jobs")


@logs.about(stage="evaluate")
def evaluate(config: Config) -> list[dict[str, Any]]:
    """Scores valid and test with every run of the experiment, one Ray task a run; returns the report's `results`.

    What a run's evaluation found is kept beside its checkpoint, in evaluation.json, and not computed again.

    Raises:
        StorageError: A run was not trained yet.
    """
    import ray

    from llm4msr.evaluation import evaluate_checkpoint, evaluate_item_mean
    from llm4msr.training.run import plan_runs

    tasks = plan_runs(config)
    for task in tasks:
        storage.read_manifest(task.checkpoint_uri, "run jobs.train with the same configuration first")
    score = ray.remote(num_cpus=1)(evaluate_checkpoint)
    places = [storage.join(task.run_uri, "evaluation.json") for task in tasks]
    pending = {
        place: score.remote(task.checkpoint_uri, task.prepared_uri)
        for task, place in zip(tasks, places, strict=True)
        if not storage.exists(place)
    }
    logger.info("%d runs to evaluate, %d evaluated before", len(pending), len(tasks) - len(pending))
    results = ray.get(ray.remote(num_cpus=1)(evaluate_item_mean).remote(tasks[0].prepared_uri))
    for number, (place, reference) in enumerate(pending.items(), start=1):
        storage.write_json(place, ray.get(reference))
        logger.info("evaluated %d of %d", number, len(pending))
    return results + [row for place in places for row in storage.read_json(place)]


def main() -> int:
    """Runs the job."""
    return run_job(lambda config: print_table(evaluate(config)), "python -m jobs.evaluate")


if __name__ == "__main__":
    sys.exit(main())
