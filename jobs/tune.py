"""Searches the learning rate and the meta networks' widths: ``python -m jobs.tune --config FILE.toml``.

Given again after a crash, it goes on; given again after its end, it prints what was found.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.session import run_job
from llm4msr import logs
from llm4msr.config import Config

# Tune prints its settings and tables, and takes Ctrl-C for a search that has ended. The job's own lines say more.
TUNE_ENVIRONMENT = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
STATES = {"stopped": "stopped early"}


@logs.about(stage="tune")
def tune(config: Config) -> dict[str, Any]:
    """Runs the search and prints its trials, the best first; returns what `llm4msr.training.tune.search` does."""
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    from llm4msr.training.tune import search

    found = search(config)
    print_trials(found["trials"])
    best = ", ".join(f"{key} = {value}" for key, value in found["trials"][0]["values"].items())
    print(f"\nBest:        {best}")
    print(f"Recipe:      {found['recipe_uri']}")
    print(f"TensorBoard: tensorboard --logdir {shlex.quote(found['uri'])}")
    print(f"\nTrain it:    python -m jobs.train --config {shlex.quote(found['recipe_uri'])}")
    return found


def print_trials(trials: Sequence[dict[str, Any]]) -> None:
    """Prints a row per trial: AUC, the values that it tried, epochs, how it ended, and why it diverged or failed."""
    table = Table(title="mean valid AUC over scenarios", title_style="bold", header_style="bold")
    table.add_column("trial")
    table.add_column("valid AUC", justify="right", no_wrap=True)
    keys = list(trials[0]["values"])
    for heading in (*(key.rsplit(".", 1)[-1].replace("_", " ") for key in keys), "epochs"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    for trial in trials:
        auc = "-" if trial["valid_auc"] is None else f"{trial['valid_auc']:.4f}"
        values = [_cell(trial["values"][key]) for key in keys]
        state = STATES.get(trial["state"], trial["state"])
        table.add_row(trial["name"].rsplit("-", 1)[-1], auc, *values, str(trial["epochs"]), state)
    # Off a terminal (a log, a pipe) the width is not known; the table must not be cut there.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)
    for trial in trials:
        if trial["message"]:
            print(f"{trial['name'].rsplit('-', 1)[-1]} {trial['state']}: {trial['message']}")


def _cell(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else f"{value:g}"


def main() -> int:
    """Runs the job."""
    return run_job(tune, "python -m jobs.tune")


if __name__ == "__main__":
    sys.exit(main())
