"""From the finished runs of `quality_peers` to its table, its differences and its goals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness import Goal, Result, goal_table, wide_console

OURS, UNSEEN = "ours", "+unseen"
JUDGED = {"mean": "mean of the scenarios", "all": "all rows"}


@dataclass(frozen=True)
class Finished:
    """One finished training.

    Attributes:
        label: Side and model.
        learning_rate: Of all weights.
        penalty: On embeddings, as ours counts it.
        seed: Of everything.
        epochs: Trained, those after the best one included.
        seconds: Of the whole process.
        valid: AUC on valid: "mean" of the scenarios, "all" rows, and each scenario by name.
        test: AUC on test, likewise.
    """

    label: str
    learning_rate: float
    penalty: float
    seed: int
    epochs: int
    seconds: float
    valid: dict[str, float]
    test: dict[str, float]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation; that of a single value is NaN."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def on_test(runs: Iterable[Finished], part: str) -> list[float]:
    """Returns the test AUC of each run: "mean", "all" or a scenario."""
    return [run.test[part] for run in runs]


def best_on_valid(chosen: Mapping[str, list[Finished]], labels: Iterable[str]) -> str | None:
    """Returns the model with the highest mean over its seeds of the mean scenario AUC on valid; None of none.

    Only those with the most seeds count: one lucky seed is no better than a mean of several.
    """
    there = [label for label in labels if label in chosen]
    most = max((len(chosen[label]) for label in there), default=0)
    full = [label for label in there if len(chosen[label]) == most]
    means = {label: statistics.mean(run.valid["mean"] for run in chosen[label]) for label in full}
    return max(means, key=means.__getitem__) if means else None


def difference(ours: Sequence[Finished], theirs: Sequence[Finished], part: str) -> dict[str, float]:
    """Returns the difference of mean test AUC, the deviation of a difference of two runs, and the standard error.

    Seeds of two libraries have nothing in common, so nothing is paired.
    """
    (a, a_std), (b, b_std) = spread(on_test(ours, part)), spread(on_test(theirs, part))
    return {
        "difference": a - b,
        "std": math.hypot(a_std, b_std),
        "standard error": math.hypot(a_std / math.sqrt(len(ours)), b_std / math.sqrt(len(theirs))),
    }


def contests(chosen: Mapping[str, list[Finished]]) -> dict[str, tuple[str, str]]:
    """Returns what is compared, by title: the best of both, and each network that both sides have."""
    ours = [label for label in chosen if label.startswith(f"{OURS}:")]
    plain = [label for label in ours if not label.endswith(UNSEEN)]
    theirs = [label for label in chosen if label not in ours]
    found = {}
    best, best_peer = best_on_valid(chosen, plain), best_on_valid(chosen, theirs)
    if best and best_peer:
        found["best"] = (best, best_peer)
    found |= {f"{a} - {b}": (a, b) for a in plain for b in theirs if a.split(":")[1] == b.split(":")[1]}
    best_unseen = best_on_valid(chosen, [label for label in ours if label.endswith(UNSEEN)])
    if best_unseen and best_peer:
        found["best with unseen_dropout"] = (best_unseen, best_peer)
    return found


def judge(
    data: str,
    config: Mapping[str, Any],
    chosen: Mapping[str, list[Finished]],
    failures: Mapping[str, str],
    not_judged: str | None,
) -> Result:
    """Returns all figures of a comparison.

    Args:
        data: Name of the data.
        config: Everything that decides what was run.
        chosen: Runs of each model at the learning rate and penalty chosen on valid.
        failures: What failed and why, by run.
        not_judged: As of `Result`.
    """
    choices = {
        label: {"learning_rate": runs[0].learning_rate, "penalty": runs[0].penalty, "seeds": len(runs)}
        for label, runs in chosen.items()
    }
    medians: dict[str, float] = {}
    for label, runs in chosen.items():
        medians[f"{label}: valid AUC, mean"] = statistics.mean(run.valid["mean"] for run in runs)
        for part in runs[0].test:
            mean, std = spread(on_test(runs, part))
            medians |= {f"{label}: test AUC, {part}": mean} | put(f"{label}: test AUC, {part}, std", std)
    ratios: dict[str, float] = {}
    pairs = contests(chosen)
    for title, (a, b) in pairs.items():
        for part in chosen[a][0].test:
            for name, value in difference(chosen[a], chosen[b], part).items():
                medians |= put(f"{title}: {part}: {name}", value)
            ratios[f"{title}: {part}"] = statistics.mean(on_test(chosen[a], part)) / statistics.mean(
                on_test(chosen[b], part)
            )
    best = pairs.get("best")
    goals = tuple(
        Goal(
            f"{data}: test AUC, {words}: best of ours - best of the peers",
            difference(chosen[best[0]], chosen[best[1]], part)["difference"] if best else None,
            ">=",
            0.0,
        )
        for part, words in JUDGED.items()
    )
    about = {"chosen": choices, "best": best and dict(zip(("ours", "peers"), best, strict=True))}
    seconds = {label: [run.seconds for run in runs] for label, runs in chosen.items()}
    return Result({**config, **about, "failures": dict(failures)}, seconds, medians, ratios, goals, not_judged)


def put(name: str, value: float) -> dict[str, float]:
    """Returns the figure, unless there is none: one seed has no deviation."""
    return {} if math.isnan(value) else {name: value}


def show(result: Result, chosen: Mapping[str, list[Finished]]) -> None:
    """Prints all models, best on valid first, then the differences and the goals."""
    console = wide_console()
    parts = list(next(iter(chosen.values()))[0].test) if chosen else []
    table = Table("model", "rate", "penalty", "seeds", "epochs", "s", "valid", *(f"test, {part}" for part in parts))

    def on_valid(label: str) -> float:
        return statistics.mean(run.valid["mean"] for run in chosen[label])

    for label in sorted(chosen, key=on_valid, reverse=True):
        runs = chosen[label]
        figures = [
            f"{statistics.mean(run.epochs for run in runs):.1f}",
            f"{statistics.mean(r.seconds for r in runs):.0f}",
        ]
        cells = [plus_minus(*spread(on_test(runs, part))) for part in parts]
        about = [f"{runs[0].learning_rate:g}", f"{runs[0].penalty:g}", str(len(runs))]
        table.add_row(label, *about, *figures, f"{on_valid(label):.4f}", *cells)
    console.print(table)
    table = Table("test AUC, ours - theirs", *parts)
    for title, (a, b) in contests(chosen).items():
        found = [difference(chosen[a], chosen[b], part) for part in parts]
        name = title if title == f"{a} - {b}" else f"{title}: {a} - {b}"
        table.add_row(name, *(plus_minus(d["difference"], d["std"], sign="+") for d in found))
    console.print(table)
    for name in result.config["failures"]:
        console.print(f"failed: {name}", markup=False)
    console.print(goal_table([result.to_json()]))


def plus_minus(mean: float, std: float, sign: str = "") -> str:
    """Returns a figure with its deviation, where it has one."""
    return f"{mean:{sign}.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")


def write(result: Result, path: Path) -> None:
    """Writes the file of a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
