"""Scores a table, or the best items of every user, with a checkpoint: ``python -m jobs.score --config FILE.toml``."""

from __future__ import annotations

import sys

from jobs.session import run_job
from llm4msr import logs
from llm4msr.config import Config


@logs.about(stage="score")
def score(config: Config) -> str:
    """Scores what was not scored yet; returns the directory of the scores."""
    from llm4msr.scoring.pipeline import score as run

    return run(config)


def main() -> int:
    """Runs the job."""
    return run_job(lambda config: print(f"Scores: {score(config)}"), "python -m jobs.score")


if __name__ == "__main__":
    sys.exit(main())
