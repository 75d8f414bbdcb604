"""Trains the runs of an experiment that are not there yet: ``python -m jobs.train --config FILE.toml``."""

from __future__ import annotations

import logging
import sys
from typing import Any

from jobs.session import run_job
from llm4msr import logs
from llm4msr.config import Config

logger = logging.getLogger("llm4msr.jobs")


@logs.about(stage="train")
def train(config: Config) -> list[dict[str, Any]]:
    """Trains each run of ``experiment.knowledge`` x ``experiment.seeds``; returns their checkpoints' metadata."""
    from llm4msr.training.run import plan_runs
    from llm4msr.training.run import train as run

    tasks = plan_runs(config)
    trained = []
    for number, task in enumerate(tasks, start=1):
        logger.info("run %d of %d: %s", number, len(tasks), task.name)
        trained.append(run(task))
        logger.info("%s: valid AUC %.4f, checkpoint %s", task.name, trained[-1]["valid_auc"], task.checkpoint_uri)
    return trained


def main() -> int:
    """Runs the job."""
    return run_job(train, "python -m jobs.train")


if __name__ == "__main__":
    sys.exit(main())
