"""Raw logs to typed, encoded, time-split Parquet: ``python -m jobs.prepare --config FILE.toml``."""

from __future__ import annotations

import logging
import sys

from jobs.session import run_job
from llm4msr import logs, storage, workspace
from llm4msr.config import Config

logger = logging.getLogger("llm4msr.jobs")


@logs.about(stage="prepare")
def prepare(config: Config) -> str:
    """Prepares the data of this configuration, or finds it done; returns its directory."""
    from llm4msr.data import synthetic
    from llm4msr.data.pipeline import prepare as run

    if config.data.kind == "synthetic":
        raw_uri = config.data.raw_uri or workspace.synthetic_raw_uri(config)
        logger.info("synthetic raw data in %s", raw_uri)
        synthetic.generate(config.data.synthetic, storage.absolute(raw_uri))
    return run(config)


def main() -> int:
    """Runs the job."""
    return run_job(prepare, "python -m jobs.prepare")


if __name__ == "__main__":
    sys.exit(main())
