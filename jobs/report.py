"""The report of an experiment: report.json and the table on the terminal."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

METRICS = (("auc", "AUC"), ("gauc", "GAUC"), ("log_loss", "log loss"))
LABELS = {
    "none": "{} alone",
    "llm": "{} + LLM4MSR",
    "shuffled": "{} + LLM4MSR (shuffled)",
    "random": "{} + LLM4MSR (random)",
}


def summarise(results: Sequence[dict[str, Any]], split: str = "test") -> list[dict[str, Any]]:
    """Averages results over seeds.

    Returns:
        One row per scenario, backbone and knowledge, in order of appearance with "all" last: mean and standard
        deviation (None below two seeds) of each metric, and the number of seeds. Undefined metrics are None.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        if row["split"] == split:
            groups[row["scenario"], row["backbone"], row["knowledge"]].append(row)
    out = []
    for (scenario, backbone, knowledge), rows in groups.items():
        summary: dict[str, Any] = {
            "scenario": scenario,
            "backbone": backbone,
            "knowledge": knowledge,
            "num_seeds": len(rows),
            "num_rows": rows[0]["num_rows"],
        }
        for metric, _ in METRICS:
            values = [row[metric] for row in rows if row[metric] is not None]
            summary[metric] = statistics.fmean(values) if values else None
            summary[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
        out.append(summary)
    order = list(dict.fromkeys(row["scenario"] for row in out if row["scenario"] != "all"))
    return sorted(out, key=lambda row: order.index(row["scenario"]) if row["scenario"] in order else len(order))


def print_table(results: Sequence[dict[str, Any]], split: str = "test") -> None:
    """Prints the comparison: scenarios, within each the models, with the AUC gain over the backbone alone."""
    summary = summarise(results, split)
    alone = {
        row["scenario"]: row["auc"] for row in summary if row["knowledge"] == "none" and row["backbone"] != "item_mean"
    }
    seeds = max((row["num_seeds"] for row in summary), default=0)
    title = f"{split} metrics, " + ("1 seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds")
    table = Table(title=title, title_style="bold", header_style="bold")
    for heading in ("scenario", "model"):
        table.add_column(heading)
    for heading in (*(label for _, label in METRICS), "AUC gain", "rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in summary:
        if last not in (None, row["scenario"]):
            table.add_section()
        label = "item mean" if row["backbone"] == "item_mean" else LABELS[row["knowledge"]].format(row["backbone"])
        gain = ""
        if row["knowledge"] != "none" and row["auc"] is not None and alone.get(row["scenario"]) is not None:
            gain = f"{row['auc'] - alone[row['scenario']]:+.4f}"
        cells = [_cell(row[metric], row[f"{metric}_std"]) for metric, _ in METRICS]
        table.add_row(row["scenario"] if row["scenario"] != last else "", label, *cells, gain, f"{row['num_rows']:,}")
        last = row["scenario"]
    # Off a terminal (a log, a pipe) the width is not known; the table must not be cut there.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)


def _cell(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"
