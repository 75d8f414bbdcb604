"""Writes what a comparison found: results.csv, summary.json, table.md, plots/*.png, report.html; manifest.json last.

The manifest is written only when no run failed: a comparison without one is not complete, though its report is there.
One of an earlier report is removed first.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from llm4msr import __version__, storage
from llm4msr.comparison import tables
from llm4msr.comparison.html import write_html
from llm4msr.comparison.plan import COMPARE_VERSION, Comparison, Outcome
from llm4msr.comparison.plots import draw_plots
from llm4msr.comparison.results import (
    SPLIT,
    Record,
    control_pairs,
    control_summaries,
    model_names,
    read_records,
    runs_of,
    scenario_summaries,
    slice_summaries,
    write_csv,
)
from llm4msr.config import digest
from llm4msr.data.prepared import PreparedData
from llm4msr.schema import ALL_SCENARIOS

REPORTED_PACKAGES = ("ray", "torch", "numpy", "scipy", "matplotlib", "pyarrow")
ITEM_MEAN = ("item_mean", "baseline")
PLOTS = {
    "auc_by_scenario.png": "AUC by scenario",
    "gain_by_scenario.png": "Gain by scenario",
    "auc_by_user_activity.png": "AUC by user activity",
    "gain_by_user_activity.png": "Gain by user activity",
    "gain_cold.png": "Gain for cold and warm users and items",
    "calibration.png": "Calibration",
    "training_curves.png": "Training curves",
}


@dataclass(frozen=True)
class Report:
    """What was written: where, the summary, and the tables that a terminal shows."""

    uri: str
    summary: dict[str, Any]
    grids: tuple[tables.Grid, ...]


def write_report(
    comparison: Comparison, outcome: Outcome, item_mean: Sequence[Mapping[str, Any]], command: str
) -> Report:
    """Writes the report.

    Args:
        comparison: What was planned.
        outcome: What became of it.
        item_mean: Report rows of the item-mean baseline.
        command: That made the report.
    """
    config, uri = comparison.config, comparison.uri
    section, names = config.compare, model_names(comparison)
    choices, failures = outcome.choices, outcome.failures
    records = read_records(comparison, choices, {*failures, *outcome.diverged})
    scenarios = scenario_summaries(records, names, section.reference)
    controls = control_summaries(records, control_pairs(comparison))
    activity = slice_summaries(records, names, section.reference, ["user activity"])
    cold = slice_summaries(records, names, section.reference, ["user", "item"])
    counted = records[0]["detail"]["counted"]
    data = PreparedData.open(comparison.prepared_uri).manifest["data"]
    models = _models(comparison, outcome, records)
    summary = {
        "command": command,
        "models": models,
        "scenarios": _with_item_mean(scenarios, item_mean),
        "controls": controls,
        "slices": activity + cold,
        "failures": [{"run": name, "message": f.message, "details": f.details} for name, f in failures.items()],
        "diverged": [{"run": name, "message": f.message} for name, f in outcome.diverged.items()],
        "num_tests": sum(row["gain"] is not None and row["gain"]["p"] is not None for row in scenarios + controls),
        "num_learning_rates_at_edge": sum(model["at_edge"] for model in models),
        "trained_otherwise": _trained_otherwise(records, section.cpus_per_run),
        "seeds": list(config.experiment.seeds),
        "tuning_seed": section.tuning_seed,
        "reference": section.reference,
        "cold": {"max_rows": section.cold_max_rows, "counted": counted},
        "data": data,
        "prepared": comparison.prepared_uri.rsplit("/", 1)[-1],
        "config": config.model_dump(mode="json"),
        "config_digest": digest(config),
        "versions": {
            "llm4msr": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in REPORTED_PACKAGES},
        },
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    sentences = tables.how_to_read(
        section.reference, config.experiment.seeds, section.cold_max_rows, counted, bool(controls)
    )
    if summary["num_tests"]:
        sentences.append(f"The tables by scenario and of the controls hold {summary['num_tests']} tests.")
    sentences += tables.cautions(summary)
    rates = {name: choice.learning_rate for name, choice in zip(names, choices, strict=True)}
    shown = [tables.gain_grid(scenarios, section.reference), *tables.scenario_grids(summary["scenarios"], rates)]
    if controls:
        shown.append(tables.control_grid(controls))
    shown += tables.slice_grids(cold)
    last = [tables.tuning_grid(models), tables.data_grid(data)]
    if failures:
        last.insert(0, tables.failure_grid(summary["failures"]))
        sentences.insert(0, f"Failed runs: {len(failures)}, listed below. They are missing from all figures.")
    heading = f"Comparison of {len(names)} models on {', '.join(_scenario_names(scenarios))}"
    plots = draw_plots(records, scenarios, activity, cold, names, section.reference)
    storage.remove(storage.join(uri, storage.MANIFEST))
    write_csv(storage.join(uri, "results.csv"), records)
    storage.write_json(storage.join(uri, "summary.json"), summary)
    for name, image in plots.items():
        _write(storage.join(uri, "plots", name), image)
    _write(storage.join(uri, "table.md"), tables.markdown(heading, sentences, [*shown, *last]).encode())
    page = write_html(
        heading,
        sentences,
        shown,
        {title: (f"{title}; the figures are in results.csv", plots[name]) for name, title in PLOTS.items()},
        last,
        command,
        _facts(comparison, summary),
    )
    _write(storage.join(uri, "report.html"), page.encode())
    if not failures:
        storage.write_manifest(uri, {"kind": "comparison", "version": COMPARE_VERSION})
    return Report(uri, summary, tuple(shown))


def _models(comparison: Comparison, outcome: Outcome, records: Sequence[Record]) -> list[dict[str, Any]]:
    found = {(r["backbone"], r["variant"], r["run"]): r for r in records}
    states = {**dict.fromkeys(outcome.failures, "failed"), **dict.fromkeys(outcome.diverged, "diverged")}
    models = []
    for model, choice in zip(comparison.models, outcome.choices, strict=True):
        runs = []
        for rate, task, chosen in runs_of(model, choice):
            record = found.get((model.backbone, model.variant, task.name))
            about = {"run": task.name, "learning_rate": rate, "seed": task.seed, "chosen": chosen}
            state = {"state": states.get(task.name, "finished")}
            kept = {name: record and record[name] for name in ("best_epoch", "num_parameters", "seconds", "devices")}
            runs.append(about | state | kept)
        tuning = [
            {"learning_rate": rate, "valid_auc": auc, "state": states.get(model.tuning[rate].name, "finished")}
            for rate, auc in choice.valid_auc.items()
        ]
        models.append(
            {
                "backbone": model.backbone,
                "variant": model.variant,
                "knowledge": model.knowledge,
                "changes": model.changes,
                "learning_rate": choice.learning_rate,
                "tuning": tuning,
                "at_edge": choice.at_edge,
                "tied": list(choice.tied) if len(choice.tied) > 1 else [],
                "num_parameters": next((run["num_parameters"] for run in runs if run["num_parameters"]), None),
                "runs": runs,
            }
        )
    return models


def _trained_otherwise(records: Sequence[Record], num_threads: int) -> list[dict[str, Any]]:
    """Lists the runs that were found again and not trained, so far as is known, as this comparison would."""
    how = {r["run"]: {name: r[name] for name in ("world_size", "num_threads")} for r in records}
    wanted = {"world_size": 1, "num_threads": num_threads}
    return [{"run": run, **found} for run, found in how.items() if found != wanted]


def _with_item_mean(rows: Sequence[dict[str, Any]], item_mean: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with the baseline's in front of each scenario's."""
    baseline = {row["scenario"]: row for row in item_mean if row["split"] == SPLIT}
    out: list[dict[str, Any]] = []
    for row in rows:
        if not out or out[-1]["scenario"] != row["scenario"]:
            mean = {k: v for k, v in baseline[row["scenario"]].items() if k not in ("knowledge", "seed", "split")}
            named = dict(zip(("backbone", "variant"), ITEM_MEAN, strict=True))
            deviations = {name: None for name in row if name.endswith("_std")}
            out.append({**mean, **named, **deviations, "num_seeds": 1, "gain": None})
        out.append(row)
    return out


def _facts(comparison: Comparison, summary: Mapping[str, Any]) -> dict[str, str]:
    runs = {run["run"]: run for model in summary["models"] for run in model["runs"]}
    seconds = sum(run["seconds"] or 0 for run in runs.values())
    changed = {
        f"{m['backbone']}, {m['variant']}": ", ".join(f"{k} = {v}" for k, v in m["changes"].items())
        for m in summary["models"]
        if m["changes"]
    }
    return {
        "made": summary["created_at"],
        "place": comparison.uri,
        "seeds": ", ".join(map(str, summary["seeds"])),
        "seed of the learning rates": str(summary["tuning_seed"]),
        "runs": f"{len(runs)}, {seconds / 60:.1f} minutes of training in all",
        "trained on": ", ".join(sorted({name for run in runs.values() for name in run["devices"] or ()})),
        "data": f"prepared/{summary['prepared']}",
        "configuration": summary["config_digest"],
        "versions": ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
        **changed,
    }


def _scenario_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(row["scenario"] for row in rows) if name != ALL_SCENARIOS]


def _write(uri: str, data: bytes) -> None:
    with storage.atomic_write(uri) as file:
        file.write(data)
