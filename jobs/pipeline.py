"""Prepare, extract, train and evaluate in turn, and report: ``python -m jobs.pipeline --config FILE.toml``.

Each stage finds what an earlier run finished, so the command can simply be given again after a crash.
"""

from __future__ import annotations

import logging
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from jobs.evaluate import evaluate
from jobs.extract import extract
from jobs.prepare import prepare
from jobs.report import print_table
from jobs.session import run_job
from jobs.train import train
from llm4msr import __version__, storage, workspace
from llm4msr.config import Config, digest

logger = logging.getLogger("llm4msr.jobs")
REPORTED_PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy")
EXAMPLE_ITEMS = 5


def run_pipeline(config: Config) -> dict[str, Any]:
    """Runs the four stages, writes report.json and prints its table.

    Returns:
        The report, as written.
    """
    seconds: dict[str, float] = {}

    def stage(name: str, function: Any) -> Any:
        logger.info("== %s", name)
        started = time.perf_counter()
        value = function(config)
        seconds[name] = round(time.perf_counter() - started, 2)
        return value

    prepared_uri = stage("prepare", prepare)
    knowledge = None
    if set(config.experiment.knowledge) != {"none"}:
        knowledge = storage.read_json(storage.join(stage("extract", extract), "summary.json"))
    trained = stage("train", train)
    results = stage("evaluate", evaluate)

    best = max(trained, key=lambda run: (run["knowledge"] == "llm", run["valid_auc"]))
    checkpoint_uri = storage.join(workspace.runs_root(config), best["model_version"], "checkpoint")
    report = {
        "results": results,
        "data": storage.read_manifest(prepared_uri, "jobs.prepare just wrote it")["data"],
        "knowledge": knowledge,
        "runs": [{k: v for k, v in run.items() if k != "history"} for run in trained],
        "checkpoint_uri": checkpoint_uri,
        "config": config.model_dump(mode="json"),
        "config_digest": digest(config),
        "versions": {
            "llm4msr": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in REPORTED_PACKAGES},
        },
        "seconds": seconds,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.write_json(workspace.report_uri(config), report)
    print_table(results)
    print(f"\nReport:      {workspace.report_uri(config)}")
    print(f"Checkpoint:  {checkpoint_uri}")
    print(f"TensorBoard: tensorboard --logdir {workspace.runs_root(config)}")
    print(f"\nServe it:    make serve WORKSPACE={shlex.quote(config.workspace_uri)}")
    print(f"and ask:     {example_request(prepared_uri)}")
    return report


def example_request(prepared_uri: str) -> str:
    """Returns a curl line for a user of the training data and a few items."""
    import json

    from llm4msr.data.prepared import PreparedData

    data = PreparedData.open(prepared_uri)
    users, items = data.users().sort_by([("num_train_rows", "descending")]), data.items()
    body = {
        "user": users["key"][0].as_py(),
        "scenario": data.schema.scenario_names[-1],
        "items": items.sort_by([("num_train_rows", "descending")])["key"][:EXAMPLE_ITEMS].to_pylist(),
    }
    request = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -s http://127.0.0.1:8000/v1/rank -H 'content-type: application/json' -d {request}"


def main() -> int:
    """Runs the job."""
    return run_job(run_pipeline, "python -m jobs.pipeline")


if __name__ == "__main__":
    sys.exit(main())
