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
from llm4msr.config import CONTROLS, Config, digest

logger = logging.getLogger("llm4msr.jobs")
REPORTED_PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy")
EXAMPLE_ITEMS = 5


def run_pipeline(config: Config) -> dict[str, Any]:
    """Runs the four stages, writes report.json and prints its table.

    A report that already says the same is kept, with the seconds of the run that did the work.

    Returns:
        The report of this call.
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

    # Controls are never served; of the others, the best on valid.
    served = [run for run in trained if run["knowledge"] not in CONTROLS] or trained
    checkpoint = f"runs/{max(served, key=lambda run: run['valid_auc'])['model_version']}/checkpoint"
    report = {
        "results": results,
        "data": storage.read_manifest(prepared_uri, "jobs.prepare just wrote it")["data"],
        "knowledge": knowledge,
        "runs": [{k: v for k, v in run.items() if k != "history"} for run in trained],
        "checkpoint": checkpoint,  # below the workspace, so that a workspace can be moved
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
    uri = workspace.report_uri(config)
    if not storage.exists(uri) or _findings(storage.read_json(uri)) != _findings(report):
        storage.write_json(uri, report)
    print_table(results)
    print(f"\nReport:      {uri}")
    print(f"Checkpoint:  {storage.join(storage.absolute(config.workspace_uri), checkpoint)}")
    print(f"TensorBoard: tensorboard --logdir {shlex.quote(workspace.runs_root(config))}")
    print(f"\nServe it:    make serve WORKSPACE={shlex.quote(config.workspace_uri)}")
    print(f"and ask:     {example_request(prepared_uri)}")
    return report


def _findings(report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report without what differs between two runs that find the same."""
    return {name: value for name, value in report.items() if name not in ("seconds", "created_at")}


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
