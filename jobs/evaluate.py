"""Exact metrics of the trained runs, and the item-mean baseline: ``python -m jobs.evaluate --config FILE.toml``."""

from __future__ import annotations

import logging
import sys
from typing import Any

from jobs.report import print_table
from jobs.session import run_job
from llm4msr import storage
from llm4msr.config import Config

logger = logging.getLogger("llm4msr.jobs")


def evaluate(config: Config) -> list[dict[str, Any]]:
    """Scores valid and test with every run of the experiment, one Ray task a run; returns the report's `results`.

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
    pending = [ray.remote(num_cpus=1)(evaluate_item_mean).remote(tasks[0].prepared_uri)]
    pending += [score.remote(task.checkpoint_uri, task.prepared_uri) for task in tasks]
    results = []
    for number, reference in enumerate(pending, start=1):
        results += ray.get(reference)
        logger.info("evaluated %d of %d", number, len(pending))
    return results


def main() -> int:
    """Runs the job."""
    return run_job(lambda config: print_table(evaluate(config)), "python -m jobs.evaluate")


if __name__ == "__main__":
    sys.exit(main())
