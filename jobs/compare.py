"""Compares backbones, knowledge and ablations over seeds: ``python -m jobs.compare --config FILE.toml``.

Prepares the data and extracts the knowledge if they are not there yet. Given again after a crash, or after runs failed,
it does what is missing; given again after its end, it writes the report anew.

Exit status: 1 where runs failed, after the report of the others was written; else as every job's (`jobs.session`).
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.extract import extract
from jobs.prepare import prepare
from jobs.session import run_job
from llm4msr import logs
from llm4msr.config import Config, ConfigError

logger = logging.getLogger("llm4msr.jobs")
NEEDED = ("matplotlib", "scipy")
LEFT_OUT = ("GAUC", "log loss", "calibration")  # on the terminal, where wide tables cannot be read


@logs.about(stage="compare")
def compare(config: Config, command: str = "python -m jobs.compare") -> dict[str, Any]:
    """Trains what is missing, writes the report below the workspace and prints its tables; returns its summary.

    Raises:
        ConfigError: What is asked for cannot be compared, or the extra ``compare`` is not installed.
        TrainingError: No run could be trained.
        TrainingInterrupted: SIGTERM came; the same command goes on.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"jobs.compare needs {' and '.join(missing)}: pip install 'llm4msr[compare]'")
    from llm4msr.comparison.plan import extractions, plan_comparison
    from llm4msr.comparison.report import write_report
    from llm4msr.comparison.run import item_mean, train_all

    wanted = extractions(config)  # names mistakes before any work
    prepare(config)
    for changed in wanted:
        extract(changed)
    comparison = plan_comparison(config)
    outcome = train_all(comparison)
    report = write_report(comparison, outcome, item_mean(comparison), command)
    print_grids(report.grids)
    for name, failure in outcome.failures.items():
        print(f"{name} failed: {failure.message}")
    print(f"\nReport:      {report.uri}/report.html")
    print(f"Table:       {report.uri}/table.md")
    print(f"All figures: {report.uri}/results.csv")
    return report.summary


def print_grids(grids: Iterable[Any]) -> None:
    """Prints `llm4msr.comparison.tables.Grid`s."""
    # Off a terminal (a log, a pipe) the width is not known; the table must not be cut there.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    for grid in grids:
        table = Table(title=f"{grid.title} ({grid.remark})", title_style="bold", header_style="bold")
        places = [place for place, heading in enumerate(grid.headings) if heading not in LEFT_OUT]
        for place in places:
            table.add_column(grid.headings[place], justify="left" if place < grid.num_text else "right", no_wrap=True)
        last = None
        for row in grid.rows:
            if last not in (None, row[0]):
                table.add_section()
            table.add_row("" if row[0] == last else row[0], *(row[place] for place in places[1:]))
            last = row[0]
        console.print(table)


def main() -> int:
    """Runs the job; returns its exit status."""
    command = shlex.join(["python", "-m", "jobs.compare", *sys.argv[1:]])
    failures: list[dict[str, Any]] = []
    status = run_job(lambda config: failures.extend(compare(config, command)["failures"]), "python -m jobs.compare")
    return status or (1 if failures else 0)


if __name__ == "__main__":
    sys.exit(main())
