"""What the runs of a comparison left, as tidy rows; and summary tables made of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llm4msr import storage
from llm4msr.comparison.plan import DETAIL_FILE, EVALUATION_FILE, Choice, Comparison, Model
from llm4msr.comparison.statistics import METRICS, compare_pairs, summarise
from llm4msr.config import CONTROLS
from llm4msr.schema import ALL_SCENARIOS
from llm4msr.training.task import TrainTask

SPLIT = "test"  # of tables and plots
Record = dict[str, Any]

ABOUT = ("run", "backbone", "variant", "knowledge", "seed", "learning_rate", "chosen")
COLUMNS = (*ABOUT, "split", "scenario", "kind", "slice", "metric", "value")
TRAINED = ("history", "best_epoch", "num_parameters", "seconds", "world_size")
EVERYTHING = {"kind": "everything", "slice": "everything"}


def read_records(comparison: Comparison, choices: Sequence[Choice], failed: Iterable[str]) -> list[Record]:
    """Reads what every finished run left: those of all learning rates that were tried, and of all seeds.

    Args:
        comparison: The plan.
        choices: Of each model, in order.
        failed: Names of the runs that are not finished.

    Returns:
        One record per model and run: `ABOUT`; evaluation and detail, as `evaluate_in_detail` returns them; history,
        best_epoch, num_parameters, seconds, world_size, num_threads and devices of the training, the last two None
        where the code that trained it did not write them down.
    """
    failed, records = set(failed), []
    for model, choice in zip(comparison.models, choices, strict=True):
        for rate, task, chosen in runs_of(model, choice):
            if task.name in failed:
                continue
            metadata = storage.read_json(storage.join(task.checkpoint_uri, "metadata.json"))
            records.append(
                {
                    "run": task.name,
                    "backbone": model.backbone,
                    "variant": model.variant,
                    "knowledge": model.knowledge,
                    "seed": task.seed,
                    "learning_rate": rate,
                    "chosen": chosen,
                    "evaluation": storage.read_json(storage.join(task.run_uri, EVALUATION_FILE)),
                    "detail": storage.read_json(storage.join(task.run_uri, DETAIL_FILE)),
                    **{name: metadata[name] for name in TRAINED},
                    **{name: metadata.get(name) for name in ("num_threads", "devices")},
                }
            )
    return records


def runs_of(model: Model, choice: Choice) -> list[tuple[float, TrainTask, bool]]:
    """Lists learning rate and run of all that was trained of a model, and whether the run counts in its mean."""
    chosen = choice.learning_rate
    runs = [] if chosen is None else [(chosen, task) for task in model.runs[chosen]]
    counting, tried = {task.name for _, task in runs}, {task.name for task in model.tuning.values()}
    found = [(rate, task, task.name in counting) for rate, task in model.tuning.items()]
    return found + [(rate, task, True) for rate, task in runs if task.name not in tried]


def tidy_rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yields one row of `COLUMNS` per run, split, scenario, slice and metric.

    Kinds of slices: everything; user activity, user, item (cold, warm); score bin (of the reliability curve); epoch.
    """
    for record in records:
        about = {name: record[name] for name in ABOUT}
        for row in (*record["evaluation"], *record["detail"]["slices"]):
            place = {**about, "split": row["split"], "scenario": row["scenario"]}
            place |= {name: row.get(name, value) for name, value in EVERYTHING.items()}
            for metric in (*METRICS, "num_rows", "num_positives"):
                yield {**place, "metric": metric, "value": row[metric]}
        number: dict[tuple[str, str], int] = {}
        for row in record["detail"]["reliability"]:
            place = {**about, "split": row["split"], "scenario": row["scenario"], "kind": "score bin"}
            number[row["split"], row["scenario"]] = n = number.get((row["split"], row["scenario"]), 0) + 1
            for metric in ("mean_score", "mean_label", "num_rows"):
                yield {**place, "slice": str(n), "metric": metric, "value": row[metric]}
        for epoch in record["history"]:
            for scenario, value in epoch["valid_auc_by_scenario"].items():
                place = {**about, "split": "valid", "scenario": scenario, "kind": "epoch"}
                yield {**place, "slice": str(epoch["epoch"] + 1), "metric": "auc", "value": value}


def write_csv(uri: str, records: Iterable[Record]) -> None:
    """Writes the tidy rows as CSV; what is not defined is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(tidy_rows(records))
    with storage.atomic_write(uri) as file:
        file.write(text.getvalue().encode())


def model_names(comparison: Comparison) -> list[tuple[str, str]]:
    """Lists backbone and variant of every model, in order."""
    return [(model.backbone, model.variant) for model in comparison.models]


def scenario_summaries(
    records: Sequence[Record], models: Sequence[tuple[str, str]], reference: str, split: str = SPLIT
) -> list[dict[str, Any]]:
    """Returns the rows of `summarise` for each scenario, "all" last, with their `scenario`."""
    return [
        {"scenario": scenario, **row}
        for scenario, rows in _by_scenario(records, split)
        for row in summarise(rows, models, reference)
    ]


def control_pairs(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Lists backbone, variant and control of every model with knowledge "llm" that has controls.

    A control differs in the kind of knowledge alone: shuffled or random, with the same backbone and changes.
    """
    return [
        (model.backbone, model.variant, other.variant)
        for model in comparison.models
        for other in comparison.models
        if model.knowledge == "llm" and other.knowledge in CONTROLS
        if (other.backbone, other.changes) == (model.backbone, model.changes)
    ]


def control_summaries(
    records: Sequence[Record], pairs: Sequence[tuple[str, str, str]], split: str = SPLIT
) -> list[dict[str, Any]]:
    """Returns the rows of `compare_pairs` for each scenario, "all" last, with their `scenario`."""
    return [
        {"scenario": scenario, **row}
        for scenario, rows in _by_scenario(records, split)
        for row in compare_pairs(rows, pairs)
    ]


def slice_summaries(
    records: Sequence[Record],
    models: Sequence[tuple[str, str]],
    reference: str,
    kinds: Sequence[str],
    scenario: str = ALL_SCENARIOS,
    split: str = SPLIT,
) -> list[dict[str, Any]]:
    """Returns the rows of `summarise` for each slice of the given kinds, with their `kind` and `slice`."""
    found = [(r, x) for r, x in _chosen(records, "slices") if _is(x, split=split, scenario=scenario)]
    out = []
    for kind in kinds:
        for name in dict.fromkeys(x["slice"] for _, x in found if x["kind"] == kind):
            rows = [_joined(r, x) for r, x in found if _is(x, kind=kind, slice=name)]
            out += [{"kind": kind, "slice": name, **row} for row in summarise(rows, models, reference)]
    return out


def _by_scenario(records: Sequence[Record], split: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    names = list(dict.fromkeys(row["scenario"] for r in records for row in r["evaluation"]))
    for scenario in sorted(names, key=lambda name: name == ALL_SCENARIOS):
        found = _chosen(records, "evaluation")
        yield scenario, [_joined(r, x) for r, x in found if _is(x, split=split, scenario=scenario)]


def _chosen(records: Iterable[Record], part: str) -> Iterator[tuple[Record, dict[str, Any]]]:
    for record in records:
        if record["chosen"]:
            yield from ((record, row) for row in (record[part] if part in record else record["detail"][part]))


def _joined(record: Record, row: dict[str, Any]) -> dict[str, Any]:
    # The report rows of a run know their backbone and kind of knowledge, not their variant.
    return {**row, **{name: record[name] for name in ("backbone", "variant", "seed")}}


def _is(row: dict[str, Any], **wanted: str) -> bool:
    return all(row[name] == value for name, value in wanted.items())
