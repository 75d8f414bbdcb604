"""Prompts through the frozen language model into the knowledge store: ``python -m jobs.extract --config FILE.toml``."""

from __future__ import annotations

import sys

from jobs.session import run_job
from llm4msr import logs
from llm4msr.config import Config


@logs.about(stage="extract")
def extract(config: Config) -> str:
    """Extracts what the store lacks; returns the directory of the knowledge table."""
    from llm4msr.knowledge.pipeline import extract as run

    return run(config)


def main() -> int:
    """Runs the job."""
    return run_job(extract, "python -m jobs.extract")


if __name__ == "__main__":
    sys.exit(main())
