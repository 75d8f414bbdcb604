"""The tables of a comparison, as text cells: one form for Markdown, HTML and the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm4msr.schema import ALL_SCENARIOS

NOTHING = "–"
SIGNIFICANT = 0.05
SLICE_NAMES = {
    ("user", "cold"): "cold users",
    ("user", "warm"): "warm users",
    ("item", "cold"): "cold items",
    ("item", "warm"): "warm items",
}
WITH_CONTROLS = (
    "llm against its controls: gains of each model with knowledge “llm” over the models that differ from it in the "
    "kind of knowledge alone: “shuffled”, the vectors of others, and “random”, noise. What is gained over the "
    "reference and not over these does not come from what the knowledge says."
)
WITHOUT_CONTROLS = (
    "No model has a control, the same with knowledge “shuffled” or “random”: a gain may come from the added parameters "
    "alone."
)


@dataclass(frozen=True)
class Grid:
    """A table: title, a remark below the title, headings, rows of cells; the first columns are text, others numbers."""

    title: str
    remark: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = 2


def how_to_read(
    reference: str, seeds: Sequence[int], cold_max_rows: int, counted: str, has_controls: bool
) -> list[str]:
    """Returns the sentences that explain the figures."""
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    sentences = [
        f"All figures are of the test split; mean ± standard deviation over {count}. Learning rates and epochs were "
        "chosen on valid.",
        f"Gain: AUC minus that of the same backbone with variant “{reference}” and the same seed, mean over seeds. "
        f"RelaImpr = (AUC − 0.5) / (AUC of “{reference}” − 0.5) − 1.",
        "p: two-sided paired t-test over n seeds, not corrected for the number of tests. It speaks of other seeds on "
        "this data and split, not of other data.",
        WITH_CONTROLS if has_controls else WITHOUT_CONTROLS,
        f"Cold users and items have at most {cold_max_rows} training {counted}"
        + ("; drawn negatives do not count." if counted == "positives" else "."),
    ]
    if len(seeds) < 2:
        sentences.insert(1, "With one seed there is no deviation and no test: give experiment.seeds at least two.")
    return sentences


def cautions(summary: Mapping[str, Any]) -> list[str]:
    """Returns the sentences about what weakens the figures, from `summary.json`'s tree."""
    sentences, models = [], summary["models"]
    if at_edge := summary["num_learning_rates_at_edge"]:
        sentences.append(
            f"The chosen learning rate of {at_edge} of {len(models)} models is at the edge of those tried, marked in "
            "the table of learning rates: a better one may lie beyond."
        )
    ways: dict[str, int] = {}
    for run in summary["trained_otherwise"]:
        threads = "threads not known" if run["num_threads"] is None else f"threads: {run['num_threads']}"
        way = f"workers: {run['world_size']}, {threads}"
        ways[way] = ways.get(way, 0) + 1
    if ways:
        found = "; ".join(f"{count} with {way}" for way, count in ways.items())
        sentences.append(
            "Runs that were found again and not trained as this comparison trains its own (workers: 1, threads: "
            f"{summary['config']['compare']['cpus_per_run']}): {found}. Rounding differs, and can show in the AUC; "
            "summary.json names them."
        )
    return sentences


def gain_grid(summaries: Sequence[Mapping[str, Any]], reference: str) -> Grid:
    """Returns the gains of all scenarios side by side, from `results.scenario_summaries`."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in summaries))
    gains: dict[tuple[str, str], dict[str, str]] = {}
    for row in summaries:
        if row["gain"] is not None:
            significant = row["gain"]["p"] is not None and row["gain"]["p"] < SIGNIFICANT
            text = gain_cells(row["gain"])[0] + (" *" if significant else "")
            gains.setdefault((row["backbone"], row["variant"]), {})[row["scenario"]] = text
    cells = tuple((*model, *(of.get(scenario, NOTHING) for scenario in scenarios)) for model, of in gains.items())
    headings = ("all scenarios" if name == ALL_SCENARIOS else name for name in scenarios)
    remark = f"AUC on test minus that of “{reference}” with the same seed; * p < {SIGNIFICANT:g}"
    return Grid("Gains by scenario", remark, ("backbone", "variant", *headings), cells)


def scenario_grids(
    summaries: Sequence[Mapping[str, Any]], learning_rates: Mapping[tuple[str, str], float | None]
) -> list[Grid]:
    """Returns a table per scenario.

    Args:
        summaries: Of `results.scenario_summaries`.
        learning_rates: Chosen, by backbone and variant.
    """
    headings = ("backbone", "variant", "AUC", "gain", "RelaImpr", "p (n)", "GAUC", "log loss", "calibration")
    grids = []
    for scenario in dict.fromkeys(row["scenario"] for row in summaries):
        rows = [row for row in summaries if row["scenario"] == scenario]
        cells = [
            (
                row["backbone"],
                row["variant"],
                _mean(row, "auc"),
                *gain_cells(row["gain"]),
                _mean(row, "gauc"),
                _mean(row, "log_loss"),
                _mean(row, "calibration", 3),
                str(row["num_seeds"]),
                number(learning_rates.get((row["backbone"], row["variant"]))),
            )
            for row in rows
        ]
        name = "All scenarios together" if scenario == ALL_SCENARIOS else f"Scenario {scenario}"
        remark = f"{rows[0]['num_rows']:,} rows of test"
        grids.append(Grid(name, remark, (*headings, "seeds", "learning rate"), tuple(cells)))
    return grids


def control_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Returns the gains of models with knowledge over their controls, from `results.control_summaries`."""
    cells = tuple(
        (
            *(row[name] for name in ("scenario", "backbone", "variant", "control")),
            *(gain_cells(row["gain"]) if row["gain"] else (NOTHING,) * 3),
        )
        for row in rows
    )
    headings = ("scenario", "backbone", "variant", "control", "gain", "RelaImpr", "p (n)")
    remark = "AUC on test minus the control's with the same seed"
    return Grid("llm against its controls", remark, headings, cells, num_text=4)


def slice_grids(summaries: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Returns a table each for cold and warm users and items, from `results.slice_summaries`."""
    grids = []
    for kind, name in dict.fromkeys((row["kind"], row["slice"]) for row in summaries):
        rows = [row for row in summaries if (row["kind"], row["slice"]) == (kind, name)]
        if not rows[0]["num_rows"]:
            continue
        cells = tuple(
            (row["backbone"], row["variant"], _mean(row, "auc"), *gain_cells(row["gain"]), _mean(row, "gauc"))
            for row in rows
        )
        remark = f"{rows[0]['num_rows']:,} rows of test, all scenarios"
        title = SLICE_NAMES[kind, name].capitalize()
        grids.append(Grid(title, remark, ("backbone", "variant", "AUC", "gain", "RelaImpr", "p (n)", "GAUC"), cells))
    return grids


def tuning_grid(models: Sequence[Mapping[str, Any]]) -> Grid:
    """Returns the AUC on valid that each model reached with each learning rate, from the summary's `models`."""
    rates = [str(tried["learning_rate"]) for tried in models[0]["tuning"]]
    rows = []
    for model in models:
        cells = []
        for tried in model["tuning"]:
            text = tried["state"] if tried["valid_auc"] is None else f"{tried['valid_auc']:.4f}"
            mark = " * edge" if model["at_edge"] else " *"
            cells.append(text + mark if tried["learning_rate"] == model["learning_rate"] else text)
        count = NOTHING if model["num_parameters"] is None else f"{model['num_parameters']:,}"
        rows.append((model["backbone"], model["variant"], *cells, count))
    remark = (
        "Mean of the scenarios' AUC on valid, one seed; * marks the chosen rate, of equal ones the first; “edge”: no "
        "lower one was tried, or no higher one."
    )
    return Grid("Learning rates", remark, ("backbone", "variant", *rates, "parameters"), tuple(rows))


def data_grid(data: Mapping[str, Any]) -> Grid:
    """Returns rows and positives by split and scenario, from the report block of the prepared data."""
    rows = tuple(
        (row["split"], row["scenario"], f"{row['num_rows']:,}", f"{row['num_positives']:,}") for row in data["rows"]
    )
    counts = {"users": "num_users", "items": "num_items", "drawn negatives": "drawn_negatives"}
    remark = ", ".join(f"{data[key]:,} {name}" for name, key in counts.items() if data.get(key))
    return Grid("Data", remark, ("split", "scenario", "rows", "positives"), rows)


def failure_grid(failures: Sequence[Mapping[str, Any]]) -> Grid:
    """Returns the runs that failed, and why."""
    rows = tuple((row["run"], row["message"]) for row in failures)
    return Grid("Failures", "The same command tries them again.", ("run", "what happened"), rows)


def markdown(heading: str, sentences: Iterable[str], grids: Iterable[Grid]) -> str:
    """Returns a Markdown document."""
    parts = [f"# {heading}", "\n".join(f"- {sentence}" for sentence in sentences)]
    for grid in grids:
        lines = [
            _line(grid.headings),
            _line("---" if i < grid.num_text else "---:" for i in range(len(grid.headings))),
            *map(_line, grid.rows),
        ]
        parts += [f"## {grid.title}", *([grid.remark] if grid.remark else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def gain_cells(gain: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Returns gain, RelaImpr and p as they are shown."""
    if gain is None:
        return "", "", ""
    std = "" if gain["std"] is None else f" ± {gain['std']:.4f}"
    improved = NOTHING if gain["rela_impr"] is None else f"{gain['rela_impr']:+.1%}"
    return f"{gain['mean']:+.4f}{std}", improved, f"{_p(gain['p'])} ({gain['num_seeds']})"


def number(value: float | None) -> str:
    """Returns a number shortly."""
    return NOTHING if value is None else f"{value:g}"


def _mean(row: Mapping[str, Any], metric: str, digits: int = 4) -> str:
    mean, std = row[metric], row[f"{metric}_std"]
    if mean is None:
        return NOTHING
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
