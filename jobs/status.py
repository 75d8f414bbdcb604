"""Shows what a workspace holds: ``python -m jobs.status --workspace_uri URI``.

Each stage is complete, running (unfinished, written a short while ago), stopped (unfinished, not written for longer),
failed (it left a file that says why) or absent; with counts, ages and places. Only looks: nothing is written, no
configuration is needed, and jobs that run are not asked. ``--json -`` prints one JSON object instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.session import reading_message
from llm4msr.status.look import RUNNING_WITHIN_S, read_status
from llm4msr.status.rows import Row, Status

PROG = "python -m jobs.status"
WIDTH = 140  # off a terminal
STYLES = {"complete": "green", "running": "cyan", "stopped": "yellow", "failed": "bold red", "absent": "dim"}
AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what is wrong with it ends the program with status 2."""
    parser = argparse.ArgumentParser(PROG, description="Shows which stages of a workspace are complete, with counts.")
    parser.add_argument("--workspace_uri", required=True, metavar="URI", help="the workspace, a folder or s3://")
    parser.add_argument("--json", metavar="FILE", help="write what is found as JSON; - for the terminal, nothing else")
    parser.add_argument(
        "--running_within_min",
        type=float,
        default=RUNNING_WITHIN_S / 60,
        metavar="N",
        help="an unfinished stage written in the last N minutes is running, another stopped (default %(default)g)",
    )
    arguments = parser.parse_args(argv)
    if not arguments.running_within_min > 0:
        parser.error(f"argument --running_within_min: found {arguments.running_within_min:g}, needed more than 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job.

    Returns:
        Exit status: 0 whatever state the stages are in, 2 there is no workspace or it cannot be read.
    """
    arguments = parse(argv)
    try:
        status = read_status(arguments.workspace_uri, arguments.running_within_min * 60)
    except Exception as error:
        message = reading_message(error, arguments.workspace_uri)
        if message is None:
            raise
        print(f"{PROG}: {message}", file=sys.stderr)
        return 2
    tree = json.dumps(status.to_json(), indent=2, ensure_ascii=False)
    if arguments.json == "-":
        print(tree)
        return 0
    if arguments.json is not None:
        Path(arguments.json).write_text(tree + "\n", encoding="utf-8")
    print_status(status)
    return 0


def print_status(status: Status) -> None:
    """Prints a row for each thing in the workspace, and below the table what else there is to say."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    table = Table(title=Text(status.workspace_uri), title_style="bold", title_justify="left", header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("counts")
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("place", overflow="fold")
    last = None
    for row in status.rows:
        if last not in (None, row.stage):
            table.add_section()
        stage = "" if row.stage == last else row.stage
        state = Text(row.state, STYLES[row.state])
        table.add_row(stage, state, counts_text(row), age_text(status.age_s(row)), Text(row.place))
        last = row.stage
    console.print(table)
    for row in status.rows:
        if row.note:
            console.print(Text(f"{row.stage}: {row.place}: {row.note}"))


def counts_text(row: Row) -> str:
    """Returns counts for people: whole numbers with their thousands parted, others with four digits."""
    shown = (
        f"{name} {number:,.4f}" if isinstance(number, float) else f"{name} {number:,}"
        for name, number in row.counts.items()
    )
    return ", ".join(shown)


def age_text(age_s: float | None) -> str:
    """Returns an age in its largest unit: 3 min, 2 h, 5 d."""
    if age_s is None:
        return ""
    size, unit = next(((size, unit) for size, unit in AGES if age_s >= size), AGES[-1])
    return f"{int(age_s // size)} {unit}"


if __name__ == "__main__":
    sys.exit(main())
